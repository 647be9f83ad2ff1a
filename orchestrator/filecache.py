"""Files of prepared data on this machine's disk: fetched once, checked, opened as memory maps, the oldest thrown away.

    FOLDER/SHA256.arrow    what a Parquet file holds, uncompressed: any row is a few bytes in a map, and not unpacked;
                           behind it the SHA-256 of that, 32 bytes: disks forget too
    FOLDER-checked/SHA256  which of it was read and found whole since this machine was started: of many processes that
                           open a file the first one reads all of it, and again who finds it changed

All processes of a machine share the folder, and the kernel's page cache with it.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError, MachineError, one_line
from orchestrator.sealed import DIGEST, seal, whole_since_boot

MEND = "prepare the data again with --verify, which mends this file alone"
LEFT_BEHIND_S = 3600.0  # age at which an unfinished file belongs to no living process
ATTEMPTS = 5  # to keep a fetched file until it is mapped
FULL = (errno.ENOSPC, errno.EDQUOT)
UNPACKED = 4  # times as large as a Parquet file its table may be
log = logging.getLogger("orchestrator.filecache")


@dataclass(frozen=True)
class TableFile:
    """A Parquet file of prepared data, as its manifest describes it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class FileCache:
    """Arrow tables by the SHA-256 of the Parquet files they came from.

    Args:
        folder: on a local disk; made when it is first needed.
        limit_bytes: of all files in it; the one that was not used for the longest time goes first.
        keep_open: tables that this process keeps mapped.
    """

    def __init__(self, folder: Path, limit_bytes: int, keep_open: int) -> None:
        self._folder, self._limit_bytes, self._keep_open = folder, limit_bytes, keep_open
        self._tables: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens its own maps."""
        return {**self.__dict__, "_tables": OrderedDict()}

    def table(self, file: TableFile, fetch: Callable[[str], bytes]) -> Any:
        """The pyarrow.Table of a file.

        Args:
            fetch: reads a file by its name, from wherever it is.

        Raises:
            DataError: twice in a row what was fetched is not what the manifest says, or cannot be fetched.
            MachineError: the cache's disk is full, or cannot be written to.
        """
        if file.sha256 in self._tables:
            self._tables.move_to_end(file.sha256)
            return self._tables[file.sha256]
        table = self._mapped(file, fetch)
        self._tables[file.sha256] = table
        while len(self._tables) > self._keep_open:
            self._tables.popitem(last=False)
        return table

    def _mapped(self, file: TableFile, fetch: Callable[[str], bytes]) -> Any:
        import pyarrow as pa

        for _ in range(ATTEMPTS):
            path = self.ensure(file, fetch)
            try:
                return self._map(path, file)
            except FileNotFoundError:
                log.warning("%s was thrown away by another process before it was read", path)
            except (pa.ArrowInvalid, OSError) as error:  # a power cut may leave a name without its content
                log.warning("%s is damaged (%s); fetching it again", path, error)
                self._throw_away(path)
        each_time = f"{file.name}: its copy in {self._folder} is gone or damaged each time"
        raise MachineError(f"{each_time}; give a larger --data-cache, or look at that disk")

    def _throw_away(self, path: str) -> None:
        try:
            _remove(path)
        except OSError as error:
            raise self._unusable(error) from error

    def ensure(self, file: TableFile, fetch: Callable[[str], bytes], needed: bool = True) -> str:
        """The local file, fetched if it is not here; raises as `table` does.

        Args:
            needed: whether others are thrown away for it where the disk is full.
        """
        path = f"{self._folder}/{file.sha256}.arrow"
        if _touched(path):
            return path
        try:
            with self._alone(file.sha256):
                if not os.path.exists(path):  # else another process was first
                    self._fill(path, _checked(file, fetch), needed)
            self._make_room(path)
        except OSError as error:
            raise self._unusable(error) from error
        return path

    def _fill(self, path: str, data: bytes, needed: bool) -> None:
        """Write a file; where the disk is full, in the place of the oldest others."""
        try:
            self._write(data, path)
        except OSError as error:
            if error.errno not in FULL or not needed:
                raise
            there = sum(size for _, size, _ in self._found())
            log.warning("%s is full: the oldest files are thrown away", self._folder)
            self._make_room(path, limit_bytes=max(0, there - UNPACKED * len(data)))
            self._write(data, path)

    def _unusable(self, error: OSError) -> MachineError:
        reason, advice = error.strerror or error, "make room there, or name another folder in ORCHESTRATOR_CACHE"
        return MachineError(f"the data cache {self._folder} cannot be used ({reason}); {advice}")

    @staticmethod
    def _map(path: str, file: TableFile) -> Any:
        import pyarrow as pa

        with open(path, "rb") as held:  # others may throw it away while it is looked at
            here = f"/proc/self/fd/{held.fileno()}"
            here = here if os.path.exists(here) else path  # not every system has that
            if not whole_since_boot(here, _mark(path)):
                raise pa.ArrowInvalid("not what was written")
            whole = pa.memory_map(here).read_buffer()
        content = len(whole) - DIGEST
        table = pa.ipc.open_file(pa.BufferReader(whole.slice(0, content))).read_all()
        if table.num_rows != file.samples:
            raise DataError(
                f"{file.name}: {table.num_rows} rows where its manifest says {file.samples}; prepare it again"
            )
        return table

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Others that want the same file wait."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = f"{self._folder}/.{name}.lock"
        while True:
            with open(lock, "w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                if not _is(held.fileno(), lock):  # who held it has thrown it away: others lock another one by now
                    continue
                try:
                    for entry in os.listdir(self._folder):
                        if entry.startswith(f".{name}.arrow."):  # of a process that was killed while it wrote
                            _remove(f"{self._folder}/{entry}")
                    yield
                finally:
                    _remove(lock)
                return

    @staticmethod
    def _write(data: bytes, path: str) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = parquet.read_table(pa.BufferReader(data)).combine_chunks()
        folder, name = os.path.split(path)
        beside = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}"
        try:
            with pa.OSFile(beside, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=max(1, table.num_rows))
            seal(beside)
            os.replace(beside, path)
        except BaseException:
            _remove(beside)
            raise

    def _found(self) -> list[tuple[int, int, Path]]:
        """When each file was last opened, how large it is, and its path."""
        found = []
        for path in self._folder.glob("*.arrow"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_atime_ns, status.st_size, path))
        return found

    def _make_room(self, newest: str, limit_bytes: int | None = None) -> None:
        """Throw away what is too much; maps of it that are open stay good."""
        limit_bytes = self._limit_bytes if limit_bytes is None else limit_bytes
        for path in self._folder.glob(".*.arrow.*"):  # of processes that were killed while they wrote
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFT_BEHIND_S:
                    path.unlink()
        found = self._found()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit_bytes:
                return
            if str(path) != newest:
                with contextlib.suppress(PermissionError):  # another user's
                    path.unlink(missing_ok=True)
                    total -= size
                    _remove(_mark(str(path)))


def _checked(file: TableFile, fetch: Callable[[str], bytes]) -> bytes:
    """A file's bytes, fetched again once if they are not those of the manifest."""
    problem = ""
    for again in ("; fetching it again", ""):
        try:
            data = fetch(file.name)
        except OSError as error:
            reason = one_line(error)
            raise DataError(f"{file.name} cannot be read: {reason}; {MEND}") from None
        found = hashlib.sha256(data).hexdigest()
        if found == file.sha256:
            return data
        problem = f"{len(data)} bytes with SHA-256 {found[:16]}... instead of {file.bytes} with {file.sha256[:16]}..."
        log.warning("%s: %s%s", file.name, problem, again)
    raise DataError(f"{file.name} is damaged: {problem}; {MEND}")


def _is(descriptor: int, path: str) -> bool:
    """Whether what is open is still what goes by this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _touched(path: str) -> bool:
    """Whether a file is there; it counts as used now, and as written when it was."""
    try:
        written_ns = os.stat(path).st_mtime_ns
    except OSError:  # it is not there; or what is there cannot be used, and is found so when it is to be written
        return False
    with contextlib.suppress(OSError):  # thrown away since then, and found so when it is opened; or another user's
        os.utime(path, ns=(time.time_ns(), written_ns))
    return True


def _mark(path: str) -> str:
    """Where it is noted that a file was found whole."""
    folder, name = os.path.split(path)
    return f"{folder}-checked/{name.removesuffix('.arrow')}"


def _remove(path: str) -> None:
    """Delete a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
