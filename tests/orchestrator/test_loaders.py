"""Loader processes: the same batches with any number of them, bounded, and gone with the process that they are for."""

import multiprocessing
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

from orchestrator import feed
from orchestrator.errors import DataError, StorageError
from orchestrator.feed import AHEAD, LoaderLostError, batches, depth
from orchestrator.plan import Request
from orchestrator.stopwatch import Stopwatch

CPU = torch.device("cpu")


class Samples:
    """Batches of several types, shapes and strides; `deadly` kills its process, `bad` cannot be read, `slow` hangs."""

    modules = ("test_loaders",)

    def __init__(
        self, deadly=-1, bad=-1, slow=-1, error: type[Exception] = DataError, sign: Path | None = None
    ) -> None:
        self.values = np.random.default_rng(0).normal(size=(100, 3, 4, 5)).astype(np.float32)
        self.deadly, self.bad, self.slow, self.error, self.sign = deadly, bad, slow, error, sign

    def __len__(self):
        return len(self.values)

    def microbatch(self, indices, epoch, progress=1.0):
        if self.deadly in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bad in indices:
            raise self.error(f"sample {self.bad} cannot be read")
        if self.slow in indices:
            if self.sign:
                self.sign.touch()
            time.sleep(600)  # until it is killed
        values = torch.from_numpy(self.values[indices]) * (epoch + progress)
        return {
            "values": values,
            "last": values.contiguous(memory_format=torch.channels_last),
            "none": torch.empty(0, 7, dtype=torch.int64),
            "flag": torch.tensor(True),
            "half": values[..., 0].to(torch.bfloat16),
        }


REQUESTS = [Request(n // 8, np.arange(4 * n, 4 * n + 4 - n % 2) % 100, n / 20) for n in range(20)]


def read(samples, processes, requests=REQUESTS):
    return list(batches(samples, iter(requests), processes, CPU))


def assert_same(plain, found):
    for (indices, batch), (there, other) in zip(plain, found, strict=True):
        assert np.array_equal(indices, there)
        for name, tensor in batch.items():
            assert torch.equal(other[name], tensor)
            assert (other[name].dtype, other[name].stride()) == (tensor.dtype, tensor.stride()), name


def test_batches_do_not_depend_on_the_processes():
    plain = read(Samples(), 0)
    for processes in (1, 3):
        assert_same(plain, read(Samples(), processes))


def test_no_requests_need_no_processes():
    assert read(Samples(), 2, []) == []


@given(st.integers(1, 64), st.integers(0, 10**9), st.integers(0, 10**10))
def test_as_far_ahead_as_fits(processes, size, room):
    used, each = depth(processes, size, room)
    assert 1 <= used <= processes
    assert 1 <= each <= AHEAD
    assert used == each == 1 or used * each * size <= room
    if room >= processes * AHEAD * size:
        assert (used, each) == (processes, AHEAD)


SIZE = 4 * sum(tensor.nbytes for tensor in Samples().microbatch(np.arange(1), 0).values())  # of a microbatch


@pytest.mark.parametrize("least", ["_room", "_shared_room"])
def test_no_more_lies_ready_than_has_room(monkeypatch, least):
    monkeypatch.setattr(feed, least, lambda: 3 * SIZE)
    asked = []
    reading = batches(Samples(), (asked.append(n) or request for n, request in enumerate(REQUESTS)), 8, CPU)
    for taken, _ in enumerate(reading, 1):
        assert len(asked) - taken <= 3
    assert taken == len(REQUESTS)


@pytest.mark.parametrize(("room", "processes"), [(2 * SIZE - 1, 0), (7, 0), (2 * SIZE, 2)])
def test_with_little_shared_memory_samples_are_read_in_the_process_itself(monkeypatch, caplog, room, processes):
    """Two microbatches have to fit."""
    monkeypatch.setattr(feed, "_shared_room", lambda: room)
    others = set(multiprocessing.active_children())
    reading = batches(Samples(), iter(REQUESTS), 3, CPU)
    found = [next(reading)]
    assert len(set(multiprocessing.active_children()) - others) == processes
    assert_same(read(Samples(), 0), found + list(reading))
    words = "samples are read in the worker itself: a microbatch takes 0 MB, of which two do not fit into its part of "
    assert [record.getMessage().startswith(f"{words}/dev/shm; ") for record in caplog.records] == [True] * (
        not processes
    )
    with pytest.raises(DataError, match=r"^sample 30 cannot be read$"):
        read(Samples(bad=30), 3)


@pytest.mark.parametrize("processes", [0, 2])
def test_the_clock_tells_when_samples_are_waited_for(processes):
    clock, there = Stopwatch(), []

    def requests():
        for request in REQUESTS:
            there.append(clock.reading)
            yield request

    reading = batches(Samples(), requests(), processes, CPU, clock)
    assert (clock.reading, clock.reads) == (False, 0), "nothing was asked for"
    for number, _ in enumerate(reading, 1):
        assert (clock.reading, clock.reads) == (False, number)
    assert number == len(REQUESTS)
    assert there == [True] * number
    assert not clock.reading
    assert clock.reads > number, "it waited for the end"


@pytest.mark.parametrize("processes", [0, 2])
def test_the_clock_does_not_stand_on_waiting_after_the_end(processes):
    clock = Stopwatch()
    reading = batches(Samples(bad=5), iter(REQUESTS), processes, CPU, clock)
    next(reading)
    with pytest.raises(DataError):
        next(reading)
    assert not clock.reading
    reading = batches(Samples(), iter(REQUESTS), processes, CPU, clock)
    next(reading)
    reads = clock.reads
    reading.close()
    assert (clock.reading, clock.reads) == (False, reads + 1)


def test_processes_end_at_once_in_the_middle_of_a_microbatch(tmp_path):
    """Torch would wait 5 s for it."""
    others = set(multiprocessing.active_children())
    reading = batches(Samples(slow=9, sign=tmp_path / "sign"), iter(REQUESTS), 2, CPU)
    next(reading)
    wait_until((tmp_path / "sign").exists, 20, "the slow one")
    assert len(set(multiprocessing.active_children()) - others) == 2
    began = time.monotonic()
    reading.close()
    assert not set(multiprocessing.active_children()) - others
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("error", [DataError, StorageError])
def test_an_error_is_raised_where_its_batch_is_due(error):
    others = set(multiprocessing.active_children())
    reading = batches(Samples(bad=30, error=error), iter(REQUESTS), 3, CPU)
    for _ in range(7):
        next(reading)
    with pytest.raises(error, match=r"^sample 30 cannot be read$"):
        next(reading)
    assert not set(multiprocessing.active_children()) - others, "its loader processes end at once"


def test_a_killed_loader_is_told_in_one_line():
    """As when memory runs out; the worker ends with it, and another takes its place."""
    others = set(multiprocessing.active_children())  # as the processes that distributed.py keeps
    with pytest.raises(LoaderLostError) as caught:
        read(Samples(deadly=30), 2)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("a loader process was killed, as when memory runs out")
    assert "--loader-processes" in line
    del caught
    wait_until(lambda: not set(multiprocessing.active_children()) - others, 20, "the end of the other loader")


PROGRAM = """
import multiprocessing, os, socket
from multiprocessing import forkserver
import numpy as np
import torch
from test_loaders import Samples
from orchestrator.feed import batches
from orchestrator.plan import Request
listening = socket.create_server(("127.0.0.1", 0))
listening.set_inheritable(True)
requests = (Request(0, np.arange(n, n + 4)) for n in range(90))
reading = batches(Samples(slow=40), requests, 2, torch.device("cpu"))
next(reading)
print(forkserver._forkserver._forkserver_pid, *(child.pid for child in multiprocessing.active_children()), flush=True)
list(reading)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_their_worker_and_hold_nothing_of_it():
    """One is in the middle of a batch that never ends."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1]), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
    server, *loaders = map(int, process.stdout.readline().split())
    assert len(loaders) == 2
    assert len(os.listdir(f"/proc/{server}/task")) == 1, "a fork copies no other thread, and its locks"
    for pid in (server, *loaders):
        for name in os.listdir(f"/proc/{pid}/fd"):
            assert not listens(f"/proc/{pid}/fd/{name}"), "whoever waits for it would not see that the worker is gone"
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, (server, *loaders))), 20, "the end of the loaders")
    process.stdout.close()


def wait_until(condition, timeout_s, what):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


def listens(path: str) -> bool:
    """Whether a descriptor is a TCP socket."""
    try:
        inode = os.readlink(path).removeprefix("socket:[").removesuffix("]")
    except FileNotFoundError:  # closed meanwhile
        return False
    return any(line.split()[9] == inode for line in Path("/proc/net/tcp").read_text().splitlines()[1:])


def is_alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
