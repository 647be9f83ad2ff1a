"""Checkpoints: atomic, checksummed, written in the background, kept K at a time.

checkpoints/step-N/ holds state.safetensors and, written last, manifest.json with its size and SHA-256. A folder
without a manifest is a checkpoint that was never finished; one whose bytes differ from the manifest is corrupted.
Either is passed over for the one before it.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from orchestrator.errors import CheckpointError
from orchestrator.storage import Folder

FORMAT = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and found whole."""

    step: int
    tensors: dict[str, Tensor]


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
        self._folder = folder
        self.identity = identity
        self._keep = keep
        self._halfway = halfway

    def steps(self) -> list[int]:
        """Steps of which there is a folder, whole or not, oldest first."""
        found = (re.fullmatch(r"step-(\d+)", name) for name in self._folder.names())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> int:
        """Write checkpoint `step`, drop those beyond `keep`; returns the bytes written."""
        from safetensors.torch import save

        name = f"step-{step}"
        state = save(dict(tensors))
        self._folder.write(f"{name}/{STATE}", state)
        self._halfway(step)
        manifest = {
            "format": FORMAT,
            "step": step,
            "identity": self.identity,
            "files": {STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}},
        }
        self._folder.write(f"{name}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        whole = [s for s in self.steps() if self._folder.read_text(f"step-{s}/{MANIFEST}") is not None]
        for old in [s for s in self.steps() if s < step and s not in whole[-self._keep :]]:
            self._folder.delete(f"step-{old}/{MANIFEST}")
            self._folder.delete(f"step-{old}")
        return len(state)

    def load(self, step: int) -> Loaded:
        """Read checkpoint `step`; raises CheckpointError naming what is wrong with it."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        where = f"{self._folder.uri}/step-{step}"
        try:
            text = self._folder.read_text(f"step-{step}/{MANIFEST}")
            if text is None:
                raise CheckpointError(f"{where}: unfinished (no {MANIFEST})")
            manifest = json.loads(text)
            size, sha256 = manifest["files"][STATE]["bytes"], manifest["files"][STATE]["sha256"]
            identity, state = manifest["identity"], self._folder.read(f"step-{step}/{STATE}")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{where}: {MANIFEST} or {STATE} unreadable ({error!r})") from None
        if len(state) != size or hashlib.sha256(state).hexdigest() != sha256:
            raise CheckpointError(f"{where}: corrupted ({STATE} does not match its checksum)")
        if identity != self.identity:
            raise CheckpointError(f"{where}: of another configuration or other data")
        try:
            return Loaded(step, load(state))
        except SafetensorError as error:
            raise CheckpointError(f"{where}: {STATE} unreadable ({error})") from None

    def load_newest(self, on_bad: Callable[[str], None]) -> Loaded | None:
        """The newest whole checkpoint or None; `on_bad` gets a line for each that had to be passed over."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except CheckpointError as error:
                on_bad(str(error))
        return None


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
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, step: int, tensors: Mapping[str, Tensor], stall_s: float) -> None:
        started = time.perf_counter()
        size = self._store.save(step, tensors)
        self._on_saved(
            {
                "step": step,
                "bytes": size,
                "stall_s": round(stall_s, 6),
                "write_s": round(time.perf_counter() - started, 6),
            }
        )
