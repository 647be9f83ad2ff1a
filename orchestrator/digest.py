"""One way to tell values apart by a hash."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
