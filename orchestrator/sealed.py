"""Files that end with the SHA-256 of what is before it, and notes of which were found whole since this machine started.

Many processes open a file: the first one reads all of it, the others trust its note, until the file is another one or
the machine has been started anew, for it is power cuts that leave a name without its content.

Paths are text here, as in filecache.py: pathlib interns the parts of every path that it is asked for, and CPython's
table of interned strings grows by those that come and go (in loader processes by 8 MB after 40 minutes).
"""

import contextlib
import functools
import hashlib
import os

DIGEST = 32  # bytes
PIECE = 2**20  # is read at a time


def seal(path: str) -> None:
    """Add the SHA-256 of a file to its end, and wait until the disk has it."""
    digest = _digest(path, os.stat(path).st_size)
    with open(path, "ab") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def whole_since_boot(path: str, note: str) -> bool:
    """Whether a sealed file is what was written; raises OSError where it cannot be read.

    Args:
        note: a file of this file's own, of which nothing is lost when it is.
    """
    status = os.stat(path)
    content = status.st_size - DIGEST
    what = f"{_boot()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
    with contextlib.suppress(OSError, ValueError):
        if _boot() and _text(note) == what:
            return True
    with open(path, "rb") as file:
        file.seek(max(0, content))
        if file.read() != _digest(path, content):  # read, not mapped: it would count as this process's memory
            return False
    with contextlib.suppress(OSError):  # it will be read once more, then
        os.makedirs(os.path.dirname(note), exist_ok=True)
        with open(note, "w") as file:
            file.write(what)
    return True


def _digest(path: str, count: int) -> bytes:
    """SHA-256 of a file's first `count` bytes; of as many as there are."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while count > 0 and (piece := file.read(min(PIECE, count))):
            found.update(piece)
            count -= len(piece)
    return found.digest()


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


@functools.cache
def _boot() -> str:
    """Another one after each start of this machine; "": it does not say."""
    try:
        return _text("/proc/sys/kernel/random/boot_id").strip()
    except OSError:
        return ""
