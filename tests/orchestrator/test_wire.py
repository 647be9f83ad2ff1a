"""Gradients and parameters between a worker and a server: whole, private, and a lost end is noticed."""

import socket
import threading

import numpy as np
import pytest

from orchestrator.errors import TrainingError
from orchestrator.wire import Answer, Asked, Hatch, Pipe

NUMEL = 300_000  # more than a socket holds at once


class Sum:
    """A server whose parameters are the sum of what was pushed."""

    def __init__(self) -> None:
        self.lock, self.version, self.total = threading.Lock(), 0, np.zeros(NUMEL, np.float32)
        self.asked: list[Asked] = []

    def __call__(self, asked: Asked) -> Answer | None:
        with self.lock:
            self.asked.append(asked)
            if asked.era == 2:
                return None
            if asked.era == 3:
                raise ValueError("odd")
            stale = self.version - asked.version
            if len(asked.gradient):
                self.total = self.total + asked.gradient
                self.version += 1
            return Answer(self.version, stale, None if asked.version == self.version else self.total.copy())


@pytest.fixture
def server():
    answer = Sum()
    hatch = Hatch("127.0.0.1", answer)
    yield answer, hatch
    hatch.close()


def test_workers_push_and_pull_at_once(server):
    answer, hatch = server

    def work(number: int) -> None:
        pipe, into, version = Pipe(*hatch.address), np.zeros(NUMEL, np.float32), -1
        for step in range(5):
            gradient = np.full(NUMEL, 10.0**number, np.float32)
            pipe.ask(Asked(1, version, step, number, 7, gradient, np.ones(3, np.float32)))
            found = pipe.answer(into)
            assert found is not None
            assert found.parameters is into
            assert np.all(into == into[0]), "torn"
            version = found.version
        pipe.close()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert answer.version == 15
    assert np.all(answer.total == 5 * 111.0)
    assert {(a.step, a.shard, a.samples, len(a.statistics)) for a in answer.asked} == {
        (step, shard, 7, 3) for step in range(5) for shard in range(3)
    }


def test_what_has_not_changed_is_not_sent(server):
    _, hatch = server
    pipe, into = Pipe(*hatch.address), np.full(NUMEL, 5.0, np.float32)
    pipe.ask(Asked(1, 0))
    assert pipe.answer(into) == Answer(0, 0, None)
    assert np.all(into == 5.0)
    pipe.ask(Asked(1, -1))
    found = pipe.answer(into)
    assert (found.version, found.stale) == (0, 1)
    assert np.all(into == 0.0)


def test_void_and_broken_answers(server):
    _, hatch = server
    pipe, into = Pipe(*hatch.address), np.empty(NUMEL, np.float32)
    pipe.ask(Asked(2, 0))
    assert pipe.answer(into) is None
    pipe.ask(Asked(3, 0))
    with pytest.raises(TrainingError, match="a parameter server failed: ValueError: odd"):
        pipe.answer(into)
    pipe.ask(Asked(1, 0))
    assert pipe.answer(into) is not None, "the connection is good still"


def exchange(pipe: Pipe, times: int) -> None:
    for _ in range(times):
        pipe.ask(Asked(1, 0))
        pipe.answer(np.empty(NUMEL, np.float32))


def test_strangers_learn_nothing(server):
    answer, hatch = server
    host, port, _ = hatch.address
    pipe = Pipe(host, port, b"x" * 32)
    with pytest.raises(ConnectionError):
        exchange(pipe, 2)  # the first question may be on its way while the other end closes
    assert not answer.asked


def test_a_server_that_ends_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe = Pipe(*server.getsockname()[:2], b"x" * 32)
        connection, _ = server.accept()
        pipe.ask(Asked(1, 0))
        connection.close()
        with pytest.raises(ConnectionError):
            pipe.answer(np.empty(NUMEL, np.float32))
