"""Memory of loader processes: shared where it can be, and given back."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator import feed
from orchestrator.feed import batches
from orchestrator.own_ray import MALLOC
from orchestrator.plan import Request

CPU = torch.device("cpu")


def held_mb():
    words = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return next(int(kb) / 1e3 for name, kb, *_ in words if name == "Private_Dirty:")


class Leftovers:
    """A batch frees 100 MB below something that stays, which C's allocator keeps; each tells what is held."""

    modules = ("test_loader_memory",)

    def __init__(self) -> None:
        self.kept, self.before, self.seen = None, 0.0, False

    def __setstate__(self, state):  # in a loader process, before it begins
        self.__dict__ = state
        feed.TRIM_EVERY_S = 0.1

    def microbatch(self, indices, epoch, progress=1.0):
        if epoch and not self.seen:
            self.kept = [bytearray(b"x" * 100_000) for _ in range(1000)][-1]
        held = held_mb()
        self.before = self.before or held
        self.seen |= held > self.before + 50  # unless it was given back in between
        return {"held_mb": torch.tensor([held])}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this kernel does not tell what is held")
@pytest.mark.timeout(60)
def test_a_loader_process_gives_memory_back_that_it_no_longer_uses():
    def requests():
        yield Request(0, np.arange(1), 0.0)
        while True:
            yield Request(1, np.arange(1), 0.0)

    made = batches(Leftovers(), requests(), 1, CPU)
    held = (float(batch["held_mb"][0]) for _, batch in made)
    before = next(held)
    assert next(mb for mb in held if mb > before + 50)
    assert next(mb for mb in held if mb < before + 20)  # or the test's time is up
    made.close()


class Large:
    """Frees large blocks, between which small ones stay; tells what was held before, with them and afterwards."""

    modules = ("test_loader_memory",)

    def __init__(self) -> None:
        self.kept = []

    def __setstate__(self, state):  # in a loader process, before it begins
        self.__dict__ = state
        feed.TRIM_EVERY_S = 1000.0

    def microbatch(self, indices, epoch, progress=1.0):
        if not epoch:
            return {"held_mb": torch.zeros(3)}
        bytearray(b"x" * 3_000_000)  # what was freed once lies on the heap from then on, unless C's allocator is told
        held, large, self.kept = [held_mb()], [], []
        for _ in range(30):
            large.append(bytearray(b"x" * 3_000_000))
            self.kept.append(bytearray(b"x" * 10_000))
        held.append(held_mb())
        large.clear()
        return {"held_mb": torch.tensor([*held, held_mb()])}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this kernel does not tell what is held")
@pytest.mark.timeout(60)
def test_a_loader_process_keeps_no_large_block_that_it_has_freed():
    """Files that are fetched come and go for weeks: on the heap each would make its own hole."""
    requests = iter([Request(0, np.arange(1), 0.0), Request(1, np.arange(1), 0.0)])
    *_, (_, batch) = batches(Large(), requests, 1, CPU)
    before, between, after = batch["held_mb"].tolist()
    assert between > before + 80, "the test itself"
    assert after < before + 10


class Counting:
    """Tells how many objects its process's garbage collector leaves alone."""

    modules = ("test_loader_memory",)

    def microbatch(self, indices, epoch, progress=1.0):
        return {"frozen": torch.tensor(gc.get_freeze_count())}


def test_what_the_fork_server_has_loaded_stays_shared():
    """The collector would write to all of it, and each loader process have a copy of its own."""
    ((_, batch),) = batches(Counting(), iter([Request(0, np.arange(1), 0.0)]), 1, CPU)
    assert batch["frozen"] > 10_000


ARROW = """
import threading
from pathlib import Path
import pyarrow as pa
from orchestrator.feed import _trim

def held():
    words = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return next(int(kb) / 1e3 for name, kb, *_ in words if name == "Private_Dirty:")

def use():
    kept = []
    for n in range(3000):
        buffer = pa.allocate_buffer(30_000)
        memoryview(buffer).cast("B")[:] = b"x" * 30_000
        kept.append(buffer)
    return kept[-1]

before, last = held(), use()
between = held()
other = threading.Thread(target=_trim)
other.start()
other.join()
print(pa.default_memory_pool().backend_name, before, between, held())
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this kernel does not tell what is held")
def test_what_arrow_has_freed_can_be_given_back_by_another_thread():
    """With the allocator that a run's processes have; each thread of Arrow's own keeps what it has freed."""
    done = subprocess.run(
        [sys.executable, "-c", ARROW], capture_output=True, text=True, timeout=60, check=True, env=os.environ | MALLOC
    )
    backend, *held = done.stdout.split()
    before, between, after = map(float, held)
    assert backend == "system"
    assert between > before + 60, "the test itself"
    assert after < before + 20
