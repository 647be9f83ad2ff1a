"""What a worker that holds a part does when the run is to stop, whatever its last generation broke in."""

from typing import Any

import pytest
from toys import toy_plan

from orchestrator import build
from orchestrator.recovery import Holding
from orchestrator.seats import LEFT, OVER, Order
from orchestrator.split_worker import Kept, SplitWorker


class State:
    """What is built anew and filled."""

    def __init__(self) -> None:
        self.loaded: tuple[dict[str, Any], int] | None = None

    def load(self, tensors: dict[str, Any], step: int) -> None:
        self.loaded = (tensors, step)


class Recorder:
    """Notes what it is to write down."""

    def __init__(self) -> None:
        self.joined: list[State] = []
        self.written: list[State] = []

    def join(self, state: State, first: bool) -> None:
        assert first
        self.joined.append(state)

    def checkpoint_now(self, state: State, lead: bool) -> None:
        self.written.append(state)

    def finish(self) -> None:
        """Nothing is being written."""


def worker(monkeypatch, kept: Kept | None, state: State | None, restored: bool) -> SplitWorker:
    monkeypatch.setattr(build, "build_state", lambda *_: State())
    made = object.__new__(SplitWorker)
    made._plan, made._workload, made._device, made._recorder = toy_plan(), None, None, Recorder()
    made._kept, made._state, made._restored = kept, state, restored
    return made


def whole(parts: int = 1) -> Kept:
    return Kept(7, Holding(0, parts, True, False), {}, {"model.w": 1}, "", -1)


def test_a_state_that_was_broken_off_half_built_is_made_again_for_the_stop(monkeypatch):
    half = State()
    stopping = worker(monkeypatch, whole(), half, restored=False)
    assert stopping._obey(Order("stop")) == OVER
    (written,) = stopping._recorder.written
    assert written is not half
    assert written.loaded == ({"model.w": 1}, 7)
    assert stopping._recorder.joined == [written]


def test_a_state_that_is_whole_is_written_as_it_is(monkeypatch):
    state = State()
    stopping = worker(monkeypatch, whole(), state, restored=True)
    assert stopping._obey(Order("stop")) == OVER
    assert stopping._recorder.written == [state]
    assert not stopping._recorder.joined


@pytest.mark.parametrize(("order", "answer"), [(Order("leave"), LEFT), (Order("over"), OVER)])
@pytest.mark.parametrize("kept", [None, whole(), whole(parts=2)])
def test_who_leaves_builds_nothing(monkeypatch, order, answer, kept):
    leaving = worker(monkeypatch, kept, None, restored=False)
    assert leaving._obey(order) == answer
    assert leaving._state is None


def test_a_newcomer_without_a_state_has_nothing_to_write(monkeypatch):
    assert worker(monkeypatch, None, None, restored=False)._obey(Order("stop")) == OVER
