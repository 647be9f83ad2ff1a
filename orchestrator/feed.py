"""Microbatches in the order they are asked for, prepared ahead by processes where that pays: torch's DataLoader.

Loader processes are forks of multiprocessing's fork server, not of the worker. A fork of the worker would hold its
connections, so that others would not see them closed when it is killed, and the locks that its threads had taken.
"""

import ctypes
import itertools
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import re
import sys
import threading
from collections.abc import Generator, Iterable
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from orchestrator.devices import sent
from orchestrator.errors import OrchestratorError
from orchestrator.heap import return_large_blocks
from orchestrator.plan import Request
from orchestrator.stopwatch import Stopwatch
from workloads.workload import Batch, Samples

Fed = tuple[NDArray[np.int64], Batch]  # the sample indices as the data set was asked for them, and what it gave
AHEAD = 4  # microbatches a process, as many as bridge a step that takes longer than others
MEMORY_SHARE = 0.125  # of this worker's part of the machine's memory, for what lies ready; as much for an evaluation
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1
TRIM_EVERY_S = 20.0  # in a thread of its own
LARGE_BLOCK = 2**20  # bytes, in a loader process: of a file that is fetched, and of its tables while it is unpacked
SHARED, MB = Path("/dev/shm"), 10**6  # where torch lays what loader processes hand over
log = logging.getLogger("orchestrator.feed")
LOST = re.compile(r"DataLoader worker \(pid")  # torch's words where one has ended by itself


class LoaderLostError(RuntimeError):
    """A loader process is gone, and the microbatches that it was making."""


class _Microbatches(Dataset[Fed | OrchestratorError]):
    """A map from a request to its batch, in the form that torch's DataLoader takes.

    An error of ours is handed over as a value: torch would wrap its one line into a loader process's traceback.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, request: Request) -> Fed | OrchestratorError:
        try:
            return request.indices, self._samples.microbatch(request.indices, request.epoch, request.progress)
        except OrchestratorError as error:
            return error


def batches(
    samples: Samples,
    requests: Iterable[Request],
    processes: int,
    device: torch.device,
    clock: Stopwatch | None = None,
) -> Generator[Fed, None, None]:
    """The (indices, batch) of `requests`, in their order, batches on `device`; close it when no more is wanted.

    Args:
        processes: that prepare batches ahead; 0 prepares each when it is asked for, in this process.
        clock: is told when this process waits for samples.

    Raises:
        DataError: a sample cannot be read.
        LoaderLostError: a loader process was killed.
    """
    microbatches, clock = _Microbatches(samples), clock or Stopwatch()
    here = (microbatches[request] for request in requests)
    made = _ahead(microbatches, samples, requests, processes) if processes else here
    clock.read(True)
    try:
        for fed in made:
            if isinstance(fed, OrchestratorError):
                raise fed
            indices, batch = fed
            clock.read(False)
            yield indices, {name: sent(tensor, device) for name, tensor in batch.items()}
            clock.read(True)
    finally:
        clock.read(True)
        made.close()  # ends the loader processes here and now: found by the garbage collector, each is waited for 5 s
        clock.read(False)


def depth(processes: int, microbatch_bytes: int, room_bytes: int) -> tuple[int, int]:
    """(processes, microbatches that each has in the works or ready): what fits into `room_bytes`, at least one."""
    fitting = max(1, room_bytes // microbatch_bytes) if microbatch_bytes else AHEAD * processes
    used = min(processes, fitting)
    return used, min(AHEAD, fitting // used)


def get_ready(samples: Samples) -> None:
    """Start the fork server; it imports what the samples need while this process does something else."""
    multiprocessing.set_forkserver_preload(["torch", "ray", *samples.modules, "orchestrator.frozen"])
    multiprocessing.forkserver.ensure_running()


def _ahead(
    microbatches: _Microbatches, samples: Samples, requests: Iterable[Request], processes: int
) -> Generator[Fed | OrchestratorError, None, None]:
    coming = iter(requests)
    first = next(coming, None)
    if first is None:
        return
    size, shared = _bytes(samples, first), _shared_room()
    if 2 * size > shared:  # one that is computed on, and one on its way
        log.warning(
            "samples are read in the worker itself: a microbatch takes %d MB, of which two do not fit into its part of "
            "%s; give that more room (docker run --shm-size), or take more --shards",
            *(size // MB, SHARED),
        )
        yield from (microbatches[request] for request in itertools.chain([first], coming))
        return
    used, each = depth(processes, size, min(_room(), shared))
    get_ready(samples)
    loader: Iterable[Fed | OrchestratorError] = DataLoader(
        microbatches,
        sampler=itertools.chain([first], coming),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=used,
        prefetch_factor=each,
        multiprocessing_context="forkserver",
        worker_init_fn=_look_after,
    )
    made = iter(loader)
    try:
        yield from made
        return
    except BaseException as error:
        # Torch would wait 5 s for each: it may be in the middle of a file that does not come. And for ever for an event
        # whose lock one of them held when it was ended.
        made._workers_done_event = threading.Event()  # type: ignore[attr-defined]
        for process in getattr(made, "_workers", ()):
            process.terminate()
        if not _is_loss(error):
            raise
    del made
    # Out here torch's error is gone, and with it what it was met in: the other processes are ended.
    raise LoaderLostError(
        "a loader process was killed, as when memory runs out; fewer --loader-processes or less data in a "
        "microbatch need less"
    )


def _is_loss(error: BaseException) -> bool:
    """Whether a loader process has ended by itself: torch says so, or the memory that it shared cannot be fetched.

    What was raised in such a process comes with words of torch's own in front.
    """
    away = isinstance(error, EOFError | OSError) and not str(error).startswith("Caught ")
    return away or (isinstance(error, RuntimeError) and bool(LOST.match(str(error))))


def _look_after(_: int) -> None:
    """In a loader process, whose own parent is the fork server: end when the worker has, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    return_large_blocks(LARGE_BLOCK)

    def watch() -> None:
        while not wait([parent.sentinel], TRIM_EVERY_S):
            _trim()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _trim() -> None:
    """Give back to the kernel what Arrow's and C's allocators keep of what is free: over hours that grows."""
    if pool := getattr(sys.modules.get("pyarrow"), "default_memory_pool", None):
        pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)


def _bytes(samples: Samples, request: Request) -> int:
    """Of a microbatch, by one sample of it; 0 where that cannot be read, which training will tell."""
    try:
        one = samples.microbatch(request.indices[:1], request.epoch, request.progress)
    except OrchestratorError:
        return 0
    return sum(tensor.nbytes for tensor in one.values()) * len(request.indices)


def _part() -> float:
    """This worker's, of its machine."""
    return min(1.0, torch.get_num_threads() / (os.cpu_count() or 1))


def _room() -> int:
    """Bytes for what lies ready: a share of this worker's part of the memory."""
    return int(MEMORY_SHARE * _memory_bytes() * _part())


def _shared_room() -> int:
    """Bytes for what lies ready in shared memory, of which containers often have little: half of what is free.

    Where it runs out torch waits for ever for what it could not lay there.
    """
    if not SHARED.exists():
        return _room()
    found = os.statvfs(SHARED)
    return int(0.5 * found.f_bavail * found.f_frsize * _part())


def _memory_bytes() -> int:
    """Of this machine, or what its container may use of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])
