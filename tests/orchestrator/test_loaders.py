"""Loader processes: the same batches with any number of them, bounded, and gone with the process that they are for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import feed, foresight
from orchestrator.errors import DataError, TrainingError
from orchestrator.feed import batches
from orchestrator.loaders import LOADERS
from orchestrator.plan import Request

CPU = torch.device("cpu")


class Samples:
    """Batches of several types, shapes and strides; `deadly` kills its loader `times` times, `bad` cannot be read."""

    modules = ("test_loaders",)

    def __init__(self, deadly: int = -1, times: int = 9, scratch: str = "", bad: int = -1, slow: int = -1) -> None:
        self.values = np.random.default_rng(0).normal(size=(100, 3, 4, 5)).astype(np.float32)
        self.deadly, self.times, self.scratch, self.bad, self.slow = deadly, times, scratch, bad, slow

    def __len__(self):
        return len(self.values)

    def microbatch(self, indices, epoch, progress=1.0):
        if self.deadly in indices:
            with open(self.scratch, "a") as deaths:
                deaths.write("x")
            if os.path.getsize(self.scratch) <= self.times:
                os.kill(os.getpid(), signal.SIGKILL)
        if self.bad in indices:
            raise DataError(f"sample {self.bad} cannot be read")
        if self.slow in indices:
            time.sleep(600)  # until it is killed
        values = torch.from_numpy(self.values[indices]) * (epoch + progress)
        return {
            "values": values,
            "last": values.contiguous(memory_format=torch.channels_last),
            "none": torch.empty(0, 7, dtype=torch.int64),
            "flag": torch.tensor(True),
            "half": values[:, 0].to(torch.bfloat16).t() if values.ndim == 3 else values[..., 0].to(torch.bfloat16),
        }


REQUESTS = [Request(n // 8, np.arange(4 * n, 4 * n + 4 - n % 2) % 100, n / 20) for n in range(20)]


def read(samples, processes, requests=REQUESTS):
    return list(batches(samples, iter(requests), processes, CPU))


def wait_until(condition, timeout_s, what):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


@pytest.fixture(autouse=True, scope="module")
def ready():
    """Loaders can be forked, so that no batch is made in this process."""
    LOADERS.open(Samples())
    wait_until(LOADERS.ready, 120, "the nursery")
    yield
    LOADERS.close()


def test_batches_do_not_depend_on_the_processes():
    plain = read(Samples(), 0)
    for processes in (1, 3, -1):
        found = read(Samples(), processes)
        assert len(found) == len(plain)
        for (indices, batch), (there, other) in zip(plain, found, strict=True):
            assert np.array_equal(indices, there)
            for name, tensor in batch.items():
                assert torch.equal(other[name], tensor)
                assert (other[name].dtype, other[name].stride()) == (tensor.dtype, tensor.stride()), name
    assert 3 <= len(LOADERS.pids) <= 4
    assert os.getpid() not in LOADERS.pids


def test_a_closed_feed_leaves_its_processes_to_the_next_one():
    reading = batches(Samples(), iter(REQUESTS), 2, CPU)
    next(reading)
    before = LOADERS.pids
    reading.close()
    assert len(read(Samples(), 2)) == len(REQUESTS)
    assert LOADERS.pids == before
    assert all(not loader.tasks for loader in LOADERS._loaders)


def test_no_more_lies_ready_than_has_room(monkeypatch):
    size = sum(tensor.nbytes + 64 for tensor in Samples().microbatch(np.arange(4), 0).values())
    monkeypatch.setattr(feed, "_memory_bytes", lambda: 3.5 * size / feed.MEMORY_SHARE * (os.cpu_count() or 1))
    asked = []
    reading = batches(Samples(), (asked.append(n) or request for n, request in enumerate(REQUESTS)), 3, CPU)
    for taken, _ in enumerate(reading, 1):
        assert len(asked) - taken <= 3, "one for each process before a size is known, then what fits"
    assert taken == len(REQUESTS)


@given(st.floats(0.001, 10), st.floats(0, 10), st.integers(1, 64))
def test_as_many_processes_as_keep_up(make_s, use_s, most):
    found = foresight.loaders(make_s, use_s, most)
    assert 1 <= found <= most
    assert found == most or found * use_s >= make_s
    assert found == 1 or (found - 1) * use_s < make_s


@given(st.integers(1, 64), st.integers(0, 10**9), st.integers(0, 10**10))
def test_as_far_ahead_as_fits(processes, size, room):
    found = foresight.ahead(processes, size, room)
    assert 1 <= found <= foresight.AHEAD * processes
    assert found == 1 or found * size <= room


def test_an_error_is_raised_where_its_batch_is_due():
    reading = batches(Samples(bad=30), iter(REQUESTS), 3, CPU)
    for _ in range(7):
        next(reading)
    with pytest.raises(DataError, match=r"^sample 30 cannot be read$"):
        next(reading)


def test_a_killed_loader_is_replaced(tmp_path):
    found = read(Samples(deadly=30, times=1, scratch=str(tmp_path / "deaths")), 2)
    for (indices, batch), (there, other) in zip(read(Samples(), 0), found, strict=True):
        assert np.array_equal(indices, there)
        assert torch.equal(batch["values"], other["values"])


def test_samples_that_kill_every_loader_end_it_with_one_line(tmp_path):
    """As when memory runs out."""
    samples = Samples(deadly=30, scratch=str(tmp_path / "deaths"))
    with pytest.raises(TrainingError) as caught:
        read(samples, 2)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("a loader process was killed by SIGKILL (as when memory runs out) over samples 28, 29, 30")
    assert "--loader-processes" in line


PROGRAM = """
import socket, sys
import numpy as np
import torch
from test_loaders import Samples
from orchestrator.feed import batches
from orchestrator.loaders import LOADERS
from orchestrator.plan import Request
from test_loaders import wait_until
listening = socket.create_server(("127.0.0.1", 0))
listening.set_inheritable(True)
LOADERS.open(Samples())
wait_until(LOADERS.ready, 120, "the nursery")
requests = (Request(0, np.arange(n, n + 4)) for n in range(90))
reading = batches(Samples(slow=40), requests, 2, torch.device("cpu"))
next(reading)
print(LOADERS._nursery.pid, *LOADERS.pids, flush=True)
list(reading)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_are_killed_with_their_worker_and_hold_nothing_of_it():
    """One is in the middle of a batch that never ends."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
    nursery, *loaders = map(int, process.stdout.readline().split())
    assert len(loaders) == 2
    for pid in (nursery, *loaders):
        assert len(os.listdir(f"/proc/{pid}/task")) == 1, "a fork copies no other thread, and its locks"
        for name in os.listdir(f"/proc/{pid}/fd"):
            assert not listens(f"/proc/{pid}/fd/{name}"), "whoever waits for it would not see that the worker is gone"
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, (nursery, *loaders))), 20, "the end of the loaders")
    process.stdout.close()


def listens(path: str) -> bool:
    """Whether a descriptor is a TCP socket."""
    try:
        inode = os.readlink(path).removeprefix("socket:[").removesuffix("]")
    except FileNotFoundError:  # a batch's memory, which was handed over meanwhile
        return False
    return any(line.split()[9] == inode for line in Path("/proc/net/tcp").read_text().splitlines()[1:])


def is_alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
