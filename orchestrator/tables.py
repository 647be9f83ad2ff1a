"""Prepared data: a folder of Parquet files and a manifest, local or in object storage, read by sample number.

FOLDER/manifest.json             what it holds, where it came from, and the SHA-256 of every file
FOLDER/train-00000.parquet ...   samples of the training split; heldout-00000.parquet ...
"""

import json
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.blocks import BlockOrder
from orchestrator.config import RunConfig
from orchestrator.errors import DataError, MachineError, OrchestratorError, UserError, one_line
from orchestrator.filecache import MEND, FileCache, TableFile
from orchestrator.storage import Folder, cache_folder

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
GB = 10**9
PLAIN, SHA256 = re.compile(r"\w[\w.-]*"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared data holds.

    Attributes:
        workload: that it was prepared for.
        source, origin, licence: what it was made from, where that is from, and under which terms it may be used, as
            they were given.
        files: of each split, in order.
        about: what the workload wants to know of it.
        broken: names of samples that could not be read, and are not in it; at most the first hundred.
        broken_count: of all of them.
        fingerprint: changes when any sample does.
        schema: column -> type, as Arrow names it.
    """

    workload: str
    source: str
    licence: str
    files: Mapping[str, tuple[TableFile, ...]]
    about: Mapping[str, Any]
    broken: tuple[str, ...]
    broken_count: int
    fingerprint: str
    schema: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    def samples(self, split: str) -> int:
        return sum(file.samples for file in self.files[split])

    def blocks(self) -> tuple[int, ...]:
        """Training samples of each file."""
        return tuple(file.samples for file in self.files["train"])

    def to_json(self) -> str:
        counts = {split: self.samples(split) for split in self.files}
        return json.dumps({"format": FORMAT, "samples": counts, **asdict(self)}, indent=1) + "\n"


def read_manifest(uri: str, workload: str, patience_s: float | None = None) -> Manifest:
    """The manifest of the prepared data at `uri`; raises UserError with one line where it cannot be used.

    With `patience_s` a server that does not answer is asked again, as long as a run waits for it (StorageError).
    """
    advice = f"make it with python -m orchestrator.prepare {workload} --source ... --out {uri}"
    try:
        data = Folder(uri, "--data", patience_s).read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--data parquet:{uri}: there is no {MANIFEST}; {advice}") from None
    except OSError as error:
        raise UserError(f"--data parquet:{uri}: cannot be read ({one_line(error)})") from None
    try:
        return parse_manifest(data, workload)
    except ValueError as error:
        raise UserError(f"--data parquet:{uri}: {error}; {advice}") from None


def parse_manifest(data: bytes, workload: str) -> Manifest:
    """A manifest's content; raises ValueError saying why it is none of data prepared for `workload`."""
    try:
        content = json.loads(data)
        version = content.pop("format")
        content.pop("samples", None)  # for people; the files have them
        if version == FORMAT:
            files = {split: tuple(map(table_file, content["files"][split])) for split in SPLITS}
            found = Manifest(**{**content, "files": files, "broken": tuple(content["broken"])})
            _check_types(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MANIFEST} is not one that this program writes") from None
    if version != FORMAT:
        raise ValueError("of another version of this program")
    if found.workload != workload:
        raise ValueError(f"prepared for {found.workload}, not for {workload}")
    return found


def table_file(raw: Any) -> TableFile:
    """A file as JSON describes it; raises ValueError or TypeError where that is none that this program writes."""
    file = TableFile(**raw)
    numbers = all(type(number) is int and number > 0 for number in (file.samples, file.bytes))
    if not (numbers and PLAIN.fullmatch(file.name) and SHA256.fullmatch(file.sha256)):
        raise ValueError(raw)
    return file


def _check_types(found: Manifest) -> None:
    """Raises ValueError."""
    texts = [found.workload, found.source, found.licence, found.origin, found.fingerprint, *found.broken]
    good = all(isinstance(text, str) for text in texts) and all(found.files.values())
    if not (good and isinstance(found.about, dict) and isinstance(found.schema, dict)):
        raise ValueError("another type than is written")


def check_whole(uri: str, workload: str, config: RunConfig) -> None:
    """Raises UserError where a file is missing or of another size: found now, not when training comes to it.

    A cache that will not do is told.
    """
    manifest = read_manifest(uri, workload)
    try:
        sizes = Folder(uri, "--data").sizes()
    except OSError as error:
        raise UserError(f"--data parquet:{uri}: cannot be read ({one_line(error)})") from None
    for file in (file for split in SPLITS for file in manifest.files[split]):
        if (size := sizes.get(file.name)) != file.bytes:
            problem = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
            raise UserError(f"--data parquet:{uri}: {file.name} {problem}; {MEND}")
    row = sum(map(_row_bytes, manifest.schema.values()))
    unpacked = sorted((max(file.bytes, file.samples * row) for file in manifest.files["train"]), reverse=True)
    least = sum(unpacked[: 2 * config.shuffle_window])
    if least > config.data_cache * GB:
        windows = f"two windows of --shuffle-window {config.shuffle_window} files ({least / GB:.1f} GB)"
        print(
            f"note: --data-cache {config.data_cache:g} GB is less than {windows}: files are fetched more than once an "
            "epoch, and those in use take more of the disk than that; give more, or a smaller window",
            file=sys.stderr,
        )


def _row_bytes(kind: str) -> int:
    """Of a value of this type as it lies unpacked; 0: not all are of one size."""
    found = re.fullmatch(r"fixed_size_list<\w+: u?int(\d+).*>\[(\d+)\]", kind)
    return int(found[1]) // 8 * int(found[2]) if found else 0


class Table:
    """The samples of one split, by number.

    Args:
        uri: of the folder.
        manifest: of it.
        split: train or heldout.
        config: for its data_cache, shuffle_window and storage_patience.
    """

    def __init__(self, uri: str, manifest: Manifest, split: str, config: RunConfig) -> None:
        window = config.shuffle_window
        self._folder = Folder(uri, "--data", config.storage_patience)
        self._folder.mounted = True  # or a disk, which has no such errors that pass
        self._hurried = Folder(uri, "--data")  # who needs a file waits for it, not who may need it
        self._files, self.fingerprint = manifest.files[split], manifest.fingerprint
        self.order = BlockOrder([file.samples for file in self._files], window)
        self._cache = FileCache(cache_folder() / "tables", int(config.data_cache * GB), keep_open=2 * window)
        self._window, self._ahead = window, set[int]()
        self._fetching: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process fetches by itself."""
        return {**self.__dict__, "_ahead": set[int](), "_fetching": None}

    def __len__(self) -> int:
        return int(self.order.firsts[-1])

    def rows(self, indices: NDArray[np.int64], columns: Sequence[str]) -> dict[str, Any]:
        """Some columns of the samples at `indices`, each a pyarrow.ChunkedArray in their order.

        Raises:
            DataError: a file is damaged or cannot be read; names it.
        """
        import pyarrow as pa

        numbers = np.searchsorted(self.order.firsts, indices, side="right") - 1
        parts, places = [], []
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            table = self._cache.table(self._files[number], self._folder.read)
            parts.append(table.select(columns).take(indices[where] - self.order.firsts[number]))
            places.append(where)
        back = np.argsort(np.concatenate(places))
        mixed = pa.concat_tables(parts).take(back)
        return {name: mixed.column(name) for name in columns}

    def fetch_ahead(self, seed: int, epoch: int, sample: int) -> None:
        """Begin to fetch the files of the window that `sample` is in, and of the next one, if that was not done."""
        number = int(np.searchsorted(self.order.firsts, sample, side="right")) - 1
        if number in self._ahead or (self._fetching and self._fetching.is_alive()):
            return
        wanted = self.order.ahead(seed, epoch, number)
        self._ahead = set(wanted[: self._window])
        # Each process of a machine begins with another one: they fetch side by side, and none of them twice.
        turn = os.getpid() % self._window
        wanted = [n for at in range(0, len(wanted), self._window) for n in _turned(wanted[at:][: self._window], turn)]
        self._fetching = threading.Thread(target=self._fetch, args=(wanted,), name="fetch-ahead", daemon=True)
        self._fetching.start()

    def _fetch(self, wanted: Sequence[int]) -> None:
        for number in wanted:
            try:
                self._cache.ensure(self._files[number], self._hurried.read, needed=False)
            except MachineError:
                return
            except DataError:
                continue  # damaged: whoever needs it will meet the same, and says so
            except (OrchestratorError, OSError):
                self._ahead = set()  # not there, or not yet: tried again with the next samples
                return


def _turned(numbers: Sequence[int], by: int) -> list[int]:
    """Those from place `by` on, and then the others."""
    return [*numbers[by:], *numbers[:by]]
