"""How long a worker computes for its shards, without waiting for the others."""

import time

import torch

from orchestrator.devices import finish


class Stopwatch:
    """Counts shards and the time in which they were computed.

    Attributes:
        shards, busy_s: in all.
    """

    def __init__(self) -> None:
        self.shards, self.busy_s = 0, 0.0
        self._started_s = 0.0
        self._device = torch.device("cpu")

    def start(self, device: torch.device) -> None:
        """A step's first shard is about to be computed."""
        self._device, self._started_s = device, time.perf_counter()

    def stop(self, shards: int) -> None:
        """So many were, when the device is done: what then keeps this worker waiting is the others'."""
        finish(self._device)
        self.shards, self.busy_s = self.shards + shards, self.busy_s + time.perf_counter() - self._started_s
