"""How long a worker computes for its shards, without waiting for the others."""

import time

import torch


class Stopwatch:
    """Counts shards and the time in which they were computed; on a GPU by its own clock, and a step late.

    Attributes:
        shards, busy_s: in all.
    """

    def __init__(self) -> None:
        self.shards, self.busy_s = 0, 0.0
        self._started_s = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._counted = 0

    def start(self, device: torch.device) -> None:
        """A step's first shard is about to be computed."""
        self._started_s = time.perf_counter()
        if device.type == "cuda":
            self._read()
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self, shards: int) -> None:
        """So many were; what the device still does for them counts."""
        if self._events is None:
            self.shards, self.busy_s = self.shards + shards, self.busy_s + time.perf_counter() - self._started_s
            return
        self._events[1].record()
        self._counted = shards

    def _read(self) -> None:
        # A step ends with a loss that is read, so the events before it have happened.
        if self._events is not None and self._counted and self._events[1].query():
            self.shards += self._counted
            self.busy_s += self._events[0].elapsed_time(self._events[1]) / 1000
        self._counted = 0
