"""Prepared data on disk, found by what it was made from; never trusted unread.

    FOLDER/entries/KEY/    one prepared text: its files and manifest.json (their sizes and SHA-256)
    FOLDER/facts/KEY.json  cheap facts about the sources (paths, sizes, times) -> the entry's key

    FOLDER/turns/KEY       locked by the process that makes an entry; others wait, and find it made

FOLDER is ORCHESTRATOR_CACHE, or ~/.cache/elastic-orchestrator. Everything is written beside its place and renamed, so
that where a file system has no locks the work is done twice, with one entry at the end.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.digest import digest
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.storage import cache_folder

MANIFEST = "manifest.json"
SMALL_BYTES = 16 * 2**20  # hashed in some 10 ms, so always compared
LEFT_BEHIND_S = 86400.0  # age at which an unfinished folder belongs to no living process
ATTEMPTS = 5  # each lost one means that another process replaced the entry at the same moment


def recall(facts: Any) -> str | None:
    """The entry's key that was remembered for these facts, if any."""
    try:
        key = json.loads(_facts_file(facts).read_text())["entry"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never remembered, or torn: the key is found the long way
    return key if isinstance(key, str) else None


def remember(facts: Any, key: str) -> None:
    """Remember which entry these facts lead to."""
    file = _facts_file(facts)
    with _writable():
        file.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        with os.fdopen(number, "w") as stream:
            json.dump({"entry": key}, stream)
        os.replace(name, file)


def open_entry(key: str, verify: bool) -> Path | None:
    """The folder of an entry, or None where there is none that is whole.

    Args:
        verify: whether to compare the SHA-256 of large files too; otherwise only their sizes.
    """
    folder = _entries() / key
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, about in files.items():
            if (folder / name).stat().st_size != about["bytes"]:
                return None
            if (verify or about["bytes"] <= SMALL_BYTES) and file_sha256(folder / name) != about["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder


def build_entry(key: str, write: Callable[[Path], None]) -> Path:
    """Make an entry by `write(folder)` and put it in place; an entry that is not whole is replaced.

    Raises UserError where the cache cannot be written.
    """
    with _turn(key):
        return open_entry(key, verify=True) or _build(key, write)


def _build(key: str, write: Callable[[Path], None]) -> Path:
    final = _entries() / key
    with _writable():
        _entries().mkdir(parents=True, exist_ok=True)
        _sweep()
        building = Path(tempfile.mkdtemp(dir=_entries(), prefix=".building-"))
    try:
        with _writable():
            write(building)
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(building.iterdir())
            }
            (building / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        for _ in range(ATTEMPTS):
            if whole := open_entry(key, verify=True):
                return whole
            _replace(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    raise OrchestratorError(f"{final} is not whole after it was written; is the disk in order?")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace(building: Path, final: Path) -> None:
    """Move what is in the way aside, then the new folder in; another process may win at either move."""
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=".broken-"))
    try:
        if final.exists() and building.exists():
            os.rename(final, aside / "entry")
        if building.exists():
            os.rename(building, final)
    except OSError:
        return  # the caller looks at what is in place now
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep() -> None:
    """Remove what killed processes left behind."""
    for folder in _entries().glob(".*-*"):
        with suppress(FileNotFoundError):  # its owner has just finished with it
            if time.time() - folder.stat().st_mtime > LEFT_BEHIND_S:
                shutil.rmtree(folder, ignore_errors=True)


def _entries() -> Path:
    return cache_folder() / "entries"


def _facts_file(facts: Any) -> Path:
    return cache_folder() / "facts" / f"{digest(facts)}.json"


@contextmanager
def _turn(key: str) -> Iterator[None]:
    """Wait for whoever makes the same entry."""
    with _writable():
        folder = cache_folder() / "turns"
        folder.mkdir(parents=True, exist_ok=True)
        turn = (folder / key).open("w")
    with turn:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"ORCHESTRATOR_CACHE {cache_folder()}: cannot be written ({error.strerror}); name another folder"
        ) from None
