"""In the environment of a command (PYTHONPATH), its workers share no memory, as if each were on a machine of its own."""

import os

if hasattr(os, "memfd_create"):
    del os.memfd_create
