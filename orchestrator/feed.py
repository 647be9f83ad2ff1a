"""Microbatches in the order they are asked for, prepared ahead by processes where that pays.

How many processes, and how far ahead: foresight.py, from what is measured. Neither changes a bit.
"""

import os
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator import foresight
from orchestrator.loaders import LOADERS, Made
from orchestrator.plan import Request
from workloads.workload import Batch, Samples

Fed = tuple[NDArray[np.int64], Batch]  # the sample indices as the data set was asked for them, and what it gave
FIRST = 2  # processes before anything was measured
WEIGHT = 0.1  # of the newest measurement, in a mean that forgets
MEMORY_SHARE = 0.125  # of this worker's part of the machine's memory, for what lies ready; as much for an evaluation
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1


def batches(
    samples: Samples, requests: Iterable[Request], processes: int, device: torch.device
) -> Generator[Fed, None, None]:
    """The (indices, batch) of `requests`, in their order, batches on `device`; close it when no more is wanted.

    Args:
        processes: that prepare batches ahead; -1: as many as are needed, at most as many as this process has threads,
            but 2; 0 prepares each when it is asked for, in this process.

    Raises:
        DataError: a sample cannot be read.
        TrainingError: loader processes die.
    """
    if not processes:
        made: Iterator[Fed] = (_here(samples, request) for request in requests)
        return _fed(made, device)
    ahead = _Ahead(samples, requests, processes)
    return _pinned(ahead, device) if device.type == "cuda" else _fed(ahead, device)


def _here(samples: Samples, request: Request) -> Fed:
    return request.indices, samples.microbatch(request.indices, request.epoch, request.progress)


def _fed(made: Iterator[Fed], device: torch.device) -> Generator[Fed, None, None]:
    try:
        for indices, batch in made:
            yield indices, {name: tensor.to(device) for name, tensor in batch.items()}
    finally:
        if isinstance(made, _Ahead):
            made.close()


def _pinned(ahead: "_Ahead", device: torch.device) -> Generator[Fed, None, None]:
    """Batches on a GPU; a thread copies the next one to pinned memory meanwhile."""
    ahead.wait_for_loaders()  # making batches in that thread would seed torch's generator under training

    def pin() -> Fed | None:
        found = next(ahead, None)
        return found and (found[0], {name: tensor.pin_memory() for name, tensor in found[1].items()})

    with ThreadPoolExecutor(1, "pin") as thread:
        coming = thread.submit(pin)
        try:
            while (found := coming.result()) is not None:
                coming = thread.submit(pin)
                yield found[0], {name: tensor.to(device, non_blocking=True) for name, tensor in found[1].items()}
        finally:
            _ = coming.cancel() or coming.exception()
            ahead.close()


class _Ahead:
    """Batches that loader processes make; this process makes them until those have started."""

    def __init__(self, samples: Samples, requests: Iterable[Request], processes: int) -> None:
        self._samples, self._requests = samples, iter(requests)
        self._feed = LOADERS.open(samples)
        self._most = processes if processes > 0 else max(FIRST, torch.get_num_threads())
        self._wanted = processes if processes > 0 else min(FIRST, self._most)
        self._measures = processes < 0
        self._given = self._taken = self._largest = 0
        self._room = int(MEMORY_SHARE * _memory_bytes() * min(1.0, torch.get_num_threads() / (os.cpu_count() or 1)))
        self._make_s = self._use_s = 0.0
        self._since = 0.0  # when the last batch was handed over

    def __iter__(self) -> Iterator[Fed]:
        return self

    def __next__(self) -> Fed:
        if self._since:
            self._use_s = _mean(self._use_s, time.perf_counter() - self._since)
        self._give()
        if self._given == self._taken:  # no loader has started, or nothing is left
            fed = _here(self._samples, next(self._requests))
        else:
            made = LOADERS.take(self._feed, self._taken)
            self._taken += 1
            self._learn(made)
            self._give()
            fed = made.indices, made.batch
        self._since = time.perf_counter()
        return fed

    def _learn(self, made: Made) -> None:
        self._largest = max(self._largest, made.bytes)
        self._make_s = _mean(self._make_s, made.seconds)
        if self._measures and self._use_s:
            self._wanted = max(self._wanted, foresight.loaders(self._make_s, self._use_s, self._most))

    def _give(self) -> None:
        """Hand out what may be made now."""
        if not LOADERS.ready():
            return
        LOADERS.grow(self._wanted)
        limit = foresight.ahead(self._wanted, self._largest, self._room)
        while self._given - self._taken < limit and (request := next(self._requests, None)) is not None:
            LOADERS.give(self._feed, self._given, self._samples, request)
            self._given += 1

    def wait_for_loaders(self) -> None:
        """Until no batch is made in this process any more."""
        while not LOADERS.ready(wait_s=1.0):
            pass

    def close(self) -> None:
        LOADERS.forget(self._feed)


def _mean(so_far: float, newest: float) -> float:
    return so_far + WEIGHT * (newest - so_far) if so_far else newest


def _memory_bytes() -> int:
    """Of this machine, or what its container may use of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])
