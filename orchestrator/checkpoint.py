"""Checkpoints: atomic, checksummed, written in the background, kept K at a time.

checkpoints/step-N/ holds state.safetensors, or of a model in parts a folder parts-XXXX/ with a file of each worker
(partfiles.py); and, written last, manifest.json with the size and SHA-256 of every file. A folder without a manifest
is a checkpoint that was never finished; one whose bytes differ from the manifest is corrupted. Either is passed over
for the one before it. Runs that hold the model whole, and in whatever parts, read both.
"""

import copy
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import CheckpointError, StorageError, UnreadableError
from orchestrator.finite import check_finite
from orchestrator.storage import Folder, Pieces

log = logging.getLogger("orchestrator.checkpoint")
FORMAT = 1
STATE, MANIFEST, PARTS = "state.safetensors", "manifest.json", "parts-"
Entries = dict[str, dict[str, Any]]  # of the manifest: bytes and sha256 of files by name
Described = Mapping[str, tuple[torch.Size, torch.dtype]]  # the tensors of a state


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and found whole; `cut`: its tensors are as they were asked for, not whole."""

    step: int
    tensors: dict[str, Tensor]
    cut: bool = False


# What safetensors calls them: https://huggingface.co/docs/safetensors/metadata_parsing
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pieces_of(tensors: Mapping[str, Tensor]) -> Pieces:
    """A state as a safetensors file, whose content is the tensors' own memory.

    The library's `save` copies everything twice: of BERT-base's 1,054 MB that took 3.1 s of a core, and 2 GB of memory
    beside the snapshot.

    Args:
        tensors: on the CPU, contiguous, of one of DTYPES.
    """
    header: dict[str, Any] = {}
    views: list[memoryview] = []
    end = 0
    # As the library does: wider types first, so that each tensor is aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        view = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        begin, end = end, end + len(view)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        views.append(view)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *views]


def whole(described: Described) -> dict[str, Tensor]:
    """Room for all of a state."""
    return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described.items()}


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: the run's checkpoints/.
        identity: of the plan; checkpoints of another identity are refused.
        keep: how many are kept.
        halfway: called with the step when the state is written and the manifest is not.
    """

    def __init__(
        self, folder: Folder, identity: str, keep: int, halfway: Callable[[int], None] = lambda step: None
    ) -> None:
        self._folder = copy.copy(folder)
        self._folder.mounted = True
        self.identity = identity
        self._keep = keep
        self._halfway = halfway

    def steps(self) -> list[int]:
        """Steps of which there is a folder, whole or not, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", name) for name in self._folder.names())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> int:
        """Write checkpoint `step`, drop those beyond `keep`; returns the bytes written."""
        return self.finish(step, self.write(step, {STATE: pieces_of(tensors)}))

    def write(self, step: int, files: Mapping[str, bytes | Pieces]) -> Entries:
        """Write files of checkpoint `step`, which is none before `finish`; returns their entries in its manifest."""
        entries = {}
        for name, content in files.items():
            pieces, sha256 = [content] if isinstance(content, bytes) else content, hashlib.sha256()
            self._folder.write(f"step-{step}/{name}", pieces)
            for piece in pieces:
                sha256.update(piece)
            entries[name] = {"bytes": sum(map(len, pieces)), "sha256": sha256.hexdigest()}
        self._halfway(step)
        return entries

    def finish(self, step: int, entries: Entries) -> int:
        """Make checkpoint `step` of files that are written, drop those beyond `keep`; returns its bytes."""
        manifest = {"format": FORMAT, "step": step, "identity": self.identity, "files": entries}
        self._folder.write(f"step-{step}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        try:
            self._prune(step, entries)
        except (OSError, StorageError):  # the checkpoint is whole; the next one tries again
            log.warning("what is not needed any more could not be deleted", exc_info=True)
        return sum(int(entry["bytes"]) for entry in entries.values())

    def _prune(self, step: int, entries: Entries) -> None:
        """Delete checkpoints beyond `keep`, and what is left of other attempts at this one.

        One that has no manifest may still be written, by a worker that led before this one and is about to leave: it
        stays until two newer ones are whole.
        """
        whole = [s for s in self.steps() if self._folder.read_text(f"step-{s}/{MANIFEST}") is not None]
        kept, abandoned = whole[-self._keep :], range(min(whole[-2:]) if len(whole) > 1 else 0)
        for old in [s for s in self.steps() if s < step and s not in kept and (s in whole or s in abandoned)]:
            self._folder.delete(f"step-{old}/{MANIFEST}")
            self._folder.delete(f"step-{old}")
        named = {name.partition("/")[0] for name in entries}
        for name in self._folder.child(f"step-{step}").names():
            if name.startswith(PARTS) and name not in named:  # an earlier attempt, or another split
                self._folder.delete(f"step-{step}/{name}")

    def load(self, step: int, room: Callable[[Described], dict[str, Tensor]] = whole) -> Loaded:
        """Read checkpoint `step`; raises CheckpointError naming what is wrong with it.

        Args:
            room: for the tensors of a state, which of them are wanted; DTensors where pieces are. Only of a checkpoint
                in parts is no more read than that.
        """
        entries = self._manifest(step)
        if STATE in entries:
            return Loaded(step, self._load_whole(step, entries))
        return Loaded(step, self._load_parts(step, entries, room), cut=True)

    def _manifest(self, step: int) -> Entries:
        """The files of checkpoint `step` by name."""
        where = f"{self._folder.uri}/step-{step}"
        try:
            text = self._folder.read_text(f"step-{step}/{MANIFEST}")
            if text is None:
                raise CheckpointError(f"{where}: unfinished (no {MANIFEST})")
            manifest = json.loads(text)
            identity, of_step = manifest["identity"], manifest["step"]
            files = manifest["files"].items()
            entries = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise _kind(error)(f"{where}: {MANIFEST} unreadable ({error!r})") from None
        if of_step != step:
            raise CheckpointError(f"{where}: is that of step {of_step}, renamed")
        if identity != self.identity:
            raise CheckpointError(f"{where}: of another configuration or other data")
        return entries

    def _read(self, step: int, entries: Entries, name: str) -> bytes:
        """A file of a checkpoint; raises CheckpointError where it is not what the manifest says."""
        where = f"{self._folder.uri}/step-{step}"
        if name not in entries:
            raise CheckpointError(f"{where}: incomplete (no {name} in {MANIFEST})")
        try:
            content = self._folder.read(f"step-{step}/{name}")
        except OSError as error:
            raise _kind(error)(f"{where}: {name} unreadable ({error!r})") from None
        entry = entries[name]
        if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{where}: corrupted ({name} does not match its checksum)")
        return content

    def _load_whole(self, step: int, entries: Entries) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        state = self._read(step, entries, STATE)
        try:
            tensors: dict[str, Tensor] = load(state)
            return tensors
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder.uri}/step-{step}: {STATE} unreadable ({error})") from None

    def _load_parts(
        self, step: int, entries: Entries, room: Callable[[Described], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        from pickle import UnpicklingError

        from orchestrator import partfiles  # its import of torch.distributed takes a second

        parts = next((name.partition("/")[0] for name in entries if name.startswith(PARTS)), PARTS)
        read = lambda name: self._read(step, entries, f"{parts}/{name}")  # noqa: E731
        try:
            metadata = partfiles.parse(read(partfiles.METADATA))
            named = room(partfiles.described(metadata))
            partfiles.fill(named, metadata, read)
        except (KeyError, ValueError, RuntimeError, UnpicklingError) as error:
            raise CheckpointError(f"{self._folder.uri}/step-{step}: does not fit this model ({error})") from None
        return named

    def load_newest(self, on_bad: Callable[[str], None]) -> Loaded | None:
        """The newest whole checkpoint or None; `on_bad` gets a line for each that had to be passed over.

        Raises StorageError where there is none, but some that cannot be read: the run would begin anew.
        """
        unreadable = ""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CheckpointError as error:
                on_bad(str(error))
                unreadable = unreadable or (str(error) if isinstance(error, UnreadableError) else "")
        refuse_to_begin_anew(unreadable)
        return None


def _kind(error: Exception) -> type[CheckpointError]:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return UnreadableError if isinstance(error, OSError) and not missing else CheckpointError


def refuse_to_begin_anew(unreadable: str) -> None:
    """Raises StorageError where the newest checkpoint that cannot be read is named."""
    if unreadable:
        raise StorageError(f"{unreadable}; no other can be gone on with: look at the folder's rights and its server")


class BackgroundWriter:
    """Writes snapshots one after the other in a thread; training waits only for the copy in memory."""

    def __init__(self, store: CheckpointStore, on_saved: Callable[[dict[str, float | int]], None]) -> None:
        self._store = store
        self._on_saved = on_saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.newest_step = -1

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def submit(self, step: int, snapshot: Callable[[], Mapping[str, Tensor]]) -> None:
        """Copy the state now and write it later; first waits for the one before. Re-raises its error."""
        started = time.perf_counter()
        self.wait()
        tensors = snapshot()
        self.newest_step = step
        self._pending = self._pool.submit(self._write, step, tensors, time.perf_counter() - started)

    def wait(self) -> None:
        """Until nothing is being written; re-raises the error of what was."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: Mapping[str, Tensor], stall_s: float) -> None:
        started = time.perf_counter()
        check_finite(tensors, step)  # nobody could go on from it, and for it one would go that somebody can
        size = self._store.save(step, tensors)
        self._on_saved(
            {
                "step": step,
                "bytes": size,
                "stall_s": round(stall_s, 6),
                "write_s": round(time.perf_counter() - started, 6),
            }
        )
