"""A folder in storage: local or any URI that pyarrow.fs knows, with atomic writes."""

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import OrchestratorError, StorageError, UserError, one_line
from orchestrator.patience import mount_is_away, patiently
from orchestrator.uris import PASSING, local_path, open_uri, try_azure

T = TypeVar("T")
Pieces = Sequence[bytes | memoryview]  # of a file's content, one after the other
PATIENCE_S = 60.0  # of a run that is going on; before it begins a user is told at once
PUT_BYTES = 64 * 2**20  # of a large object, sent before more is taken
BESIDE = re.compile(r"\.(.+)\.[0-9a-f]{8}")  # what Folder writes beside a file, to rename it then
log = logging.getLogger("orchestrator.storage")


def half_written(name: str) -> str:
    """The name of the file that `name` was to become when its writer was killed, "" where it is no such file."""
    found = BESIDE.fullmatch(name)
    return found[1] if found else ""


class Folder:
    """One folder; every write of a whole file is atomic: the old content or the new, never a part.

    A local file is written beside its place, flushed to the disk and renamed. Object stores put an object when its
    stream is closed without error, which is atomic there; Azure empties the old one before.

    A server that refuses what it is asked for, or does not answer, raises UserError, and with `patience_s` StorageError
    (when that is over): one line. A file that is not there raises FileNotFoundError. A local folder raises OSError as
    it does, but with `patience_s` StorageError at once where it cannot be written to. Reads of one that is `mounted`
    are tried again while its server is away: whoever reads can wait.
    """

    def __init__(self, uri: str, flag: str = "--storage", patience_s: float | None = None) -> None:
        """Args:
            uri: a path or a URI such as s3://bucket/runs; a query (?region=...) stays with every part of it.
            flag: by which the user gave it.
            patience_s: for how long a server that does not answer is asked again; None: there is no run yet.

        Raises:
            UserError: the URI cannot be used.
        """
        from pyarrow import fs

        self._flag, self._patience_s, self.mounted = flag, patience_s, False
        self._root = local_path(uri, flag)
        self.is_local = bool(self._root)
        if self.is_local:
            self._query, self._fs = "", fs.LocalFileSystem()
            return
        address, mark, query = uri.partition("?")
        self._query, self._address = mark + query, address.rstrip("/")
        self._fs, self._root = self._patiently(lambda: open_uri(uri, flag))
        self._patiently(lambda: try_azure(uri, self._fs, self._root))

    @property
    def uri(self) -> str:
        """The folder's address; `Folder(uri)` is the same folder."""
        return self._root if self.is_local else self._address + self._query

    def child(self, name: str) -> "Folder":
        """The folder `name` in this one."""
        if self.is_local:
            return Folder(f"{self._root}/{name}", self._flag, self._patience_s)
        return Folder(f"{self._address}/{name}{self._query}", self._flag, self._patience_s)

    def path(self, name: str) -> str:
        """Where file `name` is, in the words of the file system."""
        return f"{self._root}/{name}"

    def _patiently(self, do: Callable[[], T]) -> T:
        """Do something, again and again while the server is away."""
        from pyarrow import ArrowException

        def as_oserror() -> T:
            try:
                return do()
            except ArrowException as error:
                raise error if isinstance(error, OSError) else OSError(one_line(error)) from error

        try:
            return patiently(as_oserror, self._is_away, self._patience_s or 0.0, self.uri)
        except OSError as error:
            if self.is_local or isinstance(error, FileNotFoundError | NotADirectoryError):
                raise
            raise self._given_up(error, self._is_away(error)) from error

    def _is_away(self, error: OSError) -> bool:
        if self.is_local:
            return self.mounted and mount_is_away(error)
        return not isinstance(error, FileNotFoundError | NotADirectoryError) and bool(PASSING.search(str(error)))

    def _given_up(self, error: OSError, is_away: bool) -> OrchestratorError:
        named, why = f"{self._flag} {self.uri}:", f"({one_line(error)})"
        said = "does not answer" if is_away else "refuses"
        if self._patience_s is None:
            rest = "the address, and whether the server is up" if is_away else "the address, the keys and their rights"
            return UserError(f"{named} {said} {why}; look at {rest}")
        told = StorageError(f"{named} {said}{f' for {self._patience_s:g} s' if is_away else ''} {why}")
        told.is_away = is_away
        return told

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""

        def do() -> bytes:
            # Of a stream an object store is asked for 256 kB at a time: 60 MB took Swift 8.9 s, and 1.7 s at once.
            with self._fs.open_input_file(self.path(name)) as file:
                data: bytes = file.read()
                return data

        return self._patiently(do)

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError where there is no such file."""
        info = self._patiently(lambda: self._fs.get_file_info(self.path(name)))
        if not info.is_file:
            raise FileNotFoundError(self.path(name))
        return int(info.size)

    def read_text(self, name: str, errors: str = "strict") -> str | None:
        """The file's text, or None where there is no such file; `errors` as of bytes.decode."""
        try:
            return self.read(name).decode(errors=errors)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def tail(self, name: str, most: int) -> bytes:
        """The last `most` bytes of a file, or all of it; b"" where there is no such file."""
        return self._from(name, lambda size: max(0, size - most), most)

    def since(self, name: str, offset: int, most: int) -> bytes:
        """At most `most` bytes of a file from `offset` on; b"" where there are none, or no such file."""
        return self._from(name, lambda size: min(offset, size), most)

    def _from(self, name: str, start: Callable[[int], int], most: int) -> bytes:
        def do() -> bytes:
            with self._fs.open_input_file(self.path(name)) as file:
                file.seek(start(size := file.size()))
                data: bytes = file.read(min(most, size))  # pyarrow makes room for all that it is asked for
                return data

        try:
            return self._patiently(do)
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def write(self, name: str, data: bytes | Pieces) -> None:
        """Write a whole file, atomically; folders on the way are made."""
        pieces = [data] if isinstance(data, bytes) else data
        if self.is_local:
            self._on_disk(lambda: self._replace(name, pieces))
        else:
            self._patiently(lambda: self._put(name, pieces))

    def _on_disk(self, do: Callable[[], None]) -> None:
        """Write to a local disk or a mounted one; what is wrong with it does not pass while one waits."""
        try:
            do()
        except OSError as error:
            if self._patience_s is not None:
                raise StorageError(f"{self._flag} {self.uri}: {one_line(error)}") from error
            raise

    def _replace(self, name: str, pieces: Pieces) -> None:
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with beside.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            raise
        _sync(target.parent)  # a rename survives a power cut only when the folder itself is flushed

    def _put(self, name: str, pieces: Pieces) -> None:
        """In a thread, which no signal interrupts: a stream that is left makes an object of what it has got."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self._put_whole, name, pieces).result()

    def _put_whole(self, name: str, pieces: Pieces) -> None:
        held = 0
        with self._fs.open_output_stream(self.path(name)) as stream:
            for piece in pieces:
                for start in range(0, len(piece), PUT_BYTES):
                    part = piece[start : start + PUT_BYTES]
                    stream.write(part)
                    held += len(part)
                    # S3's keeps a copy of what it has not sent, and fails at its end; Azure's would show a part of it.
                    if held >= PUT_BYTES and self._fs.type_name == "s3":
                        stream.flush()
                        held = 0

    def append(self, name: str, text: str) -> None:
        """Add whole lines at the end; object stores cannot, so there the object is written anew."""
        if not self.is_local:
            self.write(name, (self.read_text(name) or "").encode() + encoded(text))
            return
        self._on_disk(lambda: self._add(name, encoded(text)))

    def _add(self, name: str, data: bytes) -> None:
        """All of it, or nothing."""
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(before)
                raise

    def cut(self, name: str, count: int) -> None:
        """Drop the last `count` bytes of a local file."""
        path = self.path(name)
        self._on_disk(lambda: os.truncate(path, os.path.getsize(path) - count))
        self.sync(name)

    def sync(self, name: str) -> None:
        """Wait until the disk has a local file, if it is there."""
        target = Path(self.path(name))
        if target.exists():
            self._on_disk(lambda: _sync(target))

    def names(self) -> list[str]:
        """Names of what is in the folder, sorted; none where the folder does not exist."""
        return sorted(info.base_name for info in self._listed())

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of each file in the folder, by one listing; none where the folder does not exist."""
        return {info.base_name: int(info.size) for info in self._listed() if info.is_file}

    def _listed(self) -> list[Any]:
        from pyarrow import fs

        everything = fs.FileSelector(self._root, allow_not_found=True)
        found: list[Any] = self._patiently(lambda: self._fs.get_file_info(everything))
        return found

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all in it; not there is fine."""
        from pyarrow import fs

        def do() -> None:
            kind = self._fs.get_file_info(self.path(name)).type
            if kind == fs.FileType.Directory:
                self._fs.delete_dir(self.path(name))
            elif kind == fs.FileType.File:
                self._fs.delete_file(self.path(name))

        self._patiently(do)

    def check_writable(self) -> None:
        """Write, read back and delete a small file; raises UserError with the reason."""
        probe = f".probe-{uuid.uuid4().hex[:8]}"
        try:
            self.write(probe, b"probe")
            if self.read(probe) != b"probe":
                raise OSError("what was read back differs from what was written")
            self.delete(probe)
        except OSError as error:
            raise UserError(
                f"{self._flag} {self.uri}: cannot be written ({one_line(error)}); give a folder or URI that can"
            ) from None


def cache_folder() -> Path:
    """Where data that can be made again is kept on this machine."""
    given = os.environ.get("ORCHESTRATOR_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "elastic-orchestrator"


def encoded(text: str) -> bytes:
    """UTF-8; what stands for other bytes in a file's name (os.fsdecode) is written out."""
    return text.encode("utf-8", "backslashreplace")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
