"""In the environment of a command (PYTHONPATH), its workers share no memory, as on machines of their own."""

import os

if hasattr(os, "memfd_create"):
    del os.memfd_create
