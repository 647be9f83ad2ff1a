"""What rank 0 notes reaches the run folder once, also where the coordinator is lost with a report under way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from toys import toy_plan

from orchestrator.events import CheckpointLoaded, Evaluated, Event
from orchestrator.journal import Journal
from orchestrator.reporter import Reporter

Answer = Callable[[list[dict[str, Any]], list[Event]], None]


class Coordinator:
    """In the place of Ray's handle: `answers` one after the other, then writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(toy_plan(shards=8), str(folder), "token", "", 0.0, again=False)
        self.answers: list[Answer] = []
        self.report = self

    def remote(self, records: list[dict[str, Any]], events: list[Event]) -> Callable[[], None]:
        answer = self.answers.pop(0) if self.answers else self.take
        return lambda: answer(records, events)

    def take(self, records: list[dict[str, Any]], events: list[Event]) -> None:
        self.journal.steps(records)
        self.journal.log(*events)


@pytest.mark.parametrize("seated", ["before the error", "after the error", "not yet"])
def test_steps_under_way_to_a_lost_coordinator_are_written_down_once(tmp_path, monkeypatch, seated):
    monkeypatch.setattr(ray, "get", lambda call: call())
    coordinator = Coordinator(tmp_path)
    reporter = Reporter(coordinator)

    def seat() -> None:
        reporter.take_over(speaks=True, recorded=coordinator.journal.recorded)

    def lost(records: list[dict[str, Any]], events: list[Event]) -> None:
        if seated == "before the error":
            seat()
        raise ray.exceptions.RayActorError

    def note(*steps: int) -> None:
        for step in steps:
            record = {"step": step, "loss": 1.0, "samples": 8, "step_s": 0.1, "generation": 1, "time_s": 0.0}
            reporter.step(record, hurry=False)
            reporter.event(CheckpointLoaded(step, 0.0))

    seat()
    note(1)
    reporter.flush()
    coordinator.answers = [lost]
    note(2, 3)
    reporter.flush()
    if seated == "after the error":
        seat()
    note(4)
    reporter.flush()
    reporter.close()
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in read] == [1, 2, 3, 4]
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in told if event["event"] == "checkpoint_loaded"] == [1, 2, 3, 4]


@pytest.mark.parametrize("accuracy", [0.75, float("nan")])
@pytest.mark.parametrize("sent", [True, False])
def test_an_evaluation_outlives_the_rank_0_that_would_have_told_of_it(tmp_path, monkeypatch, accuracy, sent):
    """All ranks have done it; it is written down once, whoever of them is lost."""
    monkeypatch.setattr(ray, "get", lambda call: call())
    coordinator = Coordinator(tmp_path)
    first, second = Reporter(coordinator), Reporter(coordinator)
    first.take_over(speaks=True, recorded=0)
    second.take_over(speaks=False, recorded=0)
    for step in (10, 20):
        for reporter in (first, second):
            reporter.event(Evaluated(step, {"accuracy": accuracy}))
        if sent or step == 10:
            first.flush()
    first._events = []  # it is lost
    second.take_over(speaks=True, recorded=20)
    second.flush()
    second.take_over(speaks=True, recorded=20)
    second.flush()
    second.event(Evaluated(30, {"accuracy": accuracy}))
    second.take_over(speaks=True, recorded=30)  # before it was sent
    second.flush()
    first.close()
    second.close()
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "evaluated"] == [10, 20, 30]


def test_an_evaluation_of_steps_that_are_void_is_not_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda call: call())
    coordinator = Coordinator(tmp_path)
    reporter = Reporter(coordinator)
    reporter.take_over(speaks=False, recorded=0)
    reporter.event(Evaluated(10, {"accuracy": 0.5}))
    reporter.forget()
    reporter.take_over(speaks=True, recorded=0)
    reporter.close()
    assert "evaluated" not in (tmp_path / "events.jsonl").read_text()
