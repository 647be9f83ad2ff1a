"""What was trained after the step that a run goes on from is void: whoever waited meanwhile forgets it."""

import dataclasses
from types import SimpleNamespace

from test_replicas import LATER, come_back, roster, sit, train
from toys import toy_plan

from orchestrator.events import Evaluated
from orchestrator.recorder import Recorder
from orchestrator.recovery import Holding
from orchestrator.seats import Seat
from orchestrator.shards import Placement
from orchestrator.split_recorder import SplitRecorder


def test_a_left_over_of_three_groups_stands_in_nobodys_way():
    r = roster("pipeline=2", 6)
    sit(r, train(r, "abcdef"))
    come_back(r, 100, lost="a")
    r.ready = {key: dataclasses.replace(m, holds=Holding(1, 2)) for key, m in r.ready.items()}
    r.saved = 90
    order = r.form(LATER)
    assert order is not None
    assert {m.step for m in order} == {-1}
    sit(r, order)
    (left,) = r.ready.values()
    assert (left.step, left.holds) == (-1, Holding())
    come_back(r, 92)
    for m in list(r.ready.values()):
        if m.id != left.id:
            r.ready[m.id] = dataclasses.replace(m, holds=dataclasses.replace(m.holds, saved=True))
    assert r.by_state(), "those who have written step 92 down may stop with it"


def record(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1.0, "samples": 8, "step_s": 0.1, "generation": 1, "time_s": 0.0}


def seat(step: int, recorded: int = 0) -> Seat:
    return Seat(2, 0, Placement((0, 8)), ("h", 1), step, False, recorded)


def told_by(kind: type[Recorder], tmp_path: object, step: int) -> tuple[list[int], list[int], Recorder]:
    """Steps and evaluations that a worker tells who had taken ten and is seated with `step`."""
    told = list[object]()
    coordinator = SimpleNamespace(report=SimpleNamespace(remote=lambda *given: told.append(given)))
    recorder = kind(toy_plan(shards=8), str(tmp_path), coordinator, SimpleNamespace())
    recorder.reporter._send = lambda: None  # type: ignore[method-assign]
    for number in range(1, 11):
        recorder.reporter.step(record(number), hurry=False)
    recorder.reporter.event(Evaluated(9, {"accuracy": 0.5}))
    recorder._writer.newest_step = 10
    recorder.take_seat(seat(step, recorded=2))
    reporter = recorder.reporter
    found = [int(r["step"]) for r in reporter._records], [e.step for e in reporter._events if isinstance(e, Evaluated)]
    reporter.close()
    return *found, recorder


def test_steps_beyond_the_state_are_not_told(tmp_path):
    assert told_by(Recorder, tmp_path, 10)[:2] == ([3, 4, 5, 6, 7, 8, 9, 10], [9])
    assert told_by(Recorder, tmp_path, 5)[:2] == ([3, 4, 5], [])
    assert told_by(Recorder, tmp_path, -1)[:2] == ([], [])


def test_a_checkpoint_beyond_the_state_does_not_spare_one(tmp_path):
    for kind in (Recorder, SplitRecorder):
        assert told_by(kind, tmp_path, 10)[2]._writer.newest_step == 10
        assert told_by(kind, tmp_path, 5)[2]._writer.newest_step == 5
    recorder = told_by(SplitRecorder, tmp_path, 5)[2]
    assert isinstance(recorder, SplitRecorder)
    recorder._saved_step = 9
    recorder.take_seat(seat(6))
    assert recorder._saved_step == 6
    recorder.reporter.close()
