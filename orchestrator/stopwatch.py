"""How long a worker computes for its shards, without waiting for others; whether it waits for samples or storage."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from orchestrator.devices import finish


class Stopwatch:
    """Counts shards and the time in which they were computed.

    Attributes:
        shards, busy_s: in all.
        reading: whether this worker waits for samples, or for storage; or evaluates, whose pieces are no shards.
        reads: how often it has.
    """

    def __init__(self) -> None:
        self.shards, self.busy_s = 0, 0.0
        self.reading, self.reads = False, 0
        self._started_s = 0.0
        self._device = torch.device("cpu")

    def start(self, device: torch.device) -> None:
        """A step's first shard is about to be computed."""
        self._device, self._started_s = device, time.perf_counter()

    def stop(self, shards: int) -> None:
        """So many were, when the device is done: what then keeps this worker waiting is the others'."""
        finish(self._device)
        self.shards, self.busy_s = self.shards + shards, self.busy_s + time.perf_counter() - self._started_s

    def told(self, place: int) -> dict[str, Any]:
        """What a heartbeat says of it; `place` grows with every wait, too."""
        reading = self.reading  # before `reads`, or a wait that ends here would be none, and no progress either
        busy_ms = int(self.busy_s * 1000)
        return {"place": place + self.reads, "shards": self.shards, "busy_ms": busy_ms, "reading": reading}

    def read(self, begins: bool) -> None:
        """A wait for samples or storage begins or ends; the end is a sign of progress, which has to be seen first."""
        self.reads += not begins
        self.reading = begins

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within, this worker waits for samples or storage."""
        self.read(True)
        try:
            yield
        finally:
            self.read(False)
