"""A run in numbers: what records say, and what a coordinator that was started anew still knows."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from toys import toy_plan

from orchestrator import meter
from orchestrator.events import (
    CheckpointSaved,
    GenerationStarted,
    Incident,
    Listener,
    RunStarted,
    WorkerLeft,
    record,
)
from orchestrator.journal import Journal
from orchestrator.meter import METRICS, Meter, Reading
from orchestrator.values import Cadence

KILL = Incident("worker_killed", 40, 2, 1, 3, 0.5, 0.04, 0.1, 0.2, 0.2, 2, "rank 1: its process ended")


def step(number: int, **given: object) -> dict[str, object]:
    shares = {"data_share": 0.1, "compute_share": 0.5, "reduce_share": 0.25}
    plain = {"step": number, "loss": 1 / number, "samples": 64, "step_s": 2.0, "workers": 2, "generation": 1}
    return {**plain, **shares, "time_s": 1000.0 + number, **given}


def values(readings: Iterable[Reading]) -> dict[str, float]:
    """By name and labels; what counters grew by is added up."""
    found: dict[str, float] = defaultdict(float)
    for reading in readings:
        key = " ".join((reading.metric.name.removeprefix("orchestrator_"), *reading.labels))
        found[key] = reading.value + (found[key] if reading.metric.counts else 0.0)
    return dict(found)


def test_names_follow_the_conventions() -> None:
    names = [m.name for m in METRICS]
    assert len(names) == len(set(names))
    for m in METRICS:
        assert re.fullmatch(r"orchestrator_[a-z_]+", m.name)
        assert m.counts == m.name.endswith("_total")
        assert not re.search(r"_(ms|s|mb|gb|minutes)(_|$)", m.name), "base units, written out"
        assert m.help.endswith(".")
        assert all(len(values) == len(m.labels) for values in m.known) or not m.counts
    assert {m.name for m in vars(meter).values() if isinstance(m, meter.Metric)} == set(names)


def test_every_kind_of_incident_begins_at_0() -> None:
    words = re.search(r"kind: (.*?)\.\n", Incident.__doc__ or "", re.DOTALL)
    assert words
    kinds = re.sub(r"\(.*?\)", "", words[1])
    assert set(re.findall(r"\w+", kinds)) == set(meter.INCIDENTS)


def test_steps_that_come_together_are_one_reading() -> None:
    found = values(Meter(Cadence(steps=10)).steps([step(7), step(8, step_s=4.0, generation=2, workers=1)]))
    phases = {phase: found.pop(f"step_seconds_total {phase}") for phase in ("data", "forward_backward", "reduction")}
    assert phases == pytest.approx({"data": 0.6, "forward_backward": 3.0, "reduction": 1.5})
    assert found.pop("step_seconds_total rest") == pytest.approx(0.9)
    assert found == {
        "committed_step": 8,
        "last_step_timestamp_seconds": 1008.0,
        "training_loss": 0.125,
        "staleness_mean": 0,
        "staleness_max": 0,
        "workers": 1,
        "generation": 2,
        "steps_total": 2,
        "samples_total": 128,
    }
    assert Meter(Cadence(steps=10)).steps([]) == []


def test_staleness_is_that_of_the_newest_step_and_of_the_latest_gradient() -> None:
    steps = [step(1, staleness_mean=1.5, staleness_max=4), step(2, staleness_mean=0.5, staleness_max=1)]
    found = values(Meter(Cadence(steps=10)).steps(steps))
    assert (found["staleness_mean"], found["staleness_max"]) == (0.5, 4)


def test_phases_that_overlap_leave_no_negative_rest() -> None:
    found = values(Meter(Cadence(steps=10)).steps([step(1, compute_share=0.9, reduce_share=0.9)]))
    assert found["step_seconds_total rest"] == 0.0


def test_an_incident() -> None:
    found = values(Meter(Cadence(steps=10)).event(record(KILL, 5.0)))
    assert found == {
        "incidents_total worker_killed": 1,
        "recovery_seconds_total worker_killed detect": 0.04,
        "recovery_seconds_total worker_killed regroup": 0.1,
        "recovery_seconds_total worker_killed restore": 0.2,
        "recovery_seconds_total worker_killed recompute": 0.2,
        "lost_steps_total": 3,
    }


@pytest.mark.parametrize(
    ("cadence", "name", "value"),
    [(Cadence(steps=10), "checkpoint_interval_steps", 10), (Cadence(seconds=60.0), "checkpoint_interval_seconds", 60)],
)
def test_checkpoints(cadence: Cadence, name: str, value: float) -> None:
    reader = Meter(cadence)
    fresh = values(reader.event(record(RunStarted("toy", 100, 8, 64, "toy", False, 1), 5.0)))
    assert fresh == {
        "run_start_timestamp_seconds": 5.0,
        "run_end_timestamp_seconds": 0,
        "planned_steps": 100,
        name: value,
        "checkpoint_step": 0,
    }
    resumed = values(reader.event(record(RunStarted("toy", 100, 8, 64, "toy", True, 1), 5.0)))
    assert "checkpoint_step" not in resumed, "what is loaded says it"
    assert values(reader.event(record(CheckpointSaved(20, 4096, 0.25, 1.5), 9.0))) == {
        "checkpoints_total": 1,
        "checkpoint_write_seconds_total": 1.5,
        "step_seconds_total checkpoint": 0.25,
        "last_checkpoint_timestamp_seconds": 9.0,
        "checkpoint_step": 20,
        "last_checkpoint_write_seconds": 1.5,
        "last_checkpoint_size_bytes": 4096,
    }


def test_a_host_that_loses_eight_workers_at_once_has_failed_once() -> None:
    reader = Meter(Cadence(steps=10))

    def left(why: str, host: str) -> dict[str, float]:
        return values(reader.event(record(WorkerLeft(why, 1, "node", 7, "", host), 5.0)))

    assert left("worker_killed", "10.0.0.1") == {"host_losses_total 10.0.0.1": 1}
    assert left("node_lost", "10.0.0.1") == {}
    assert left("worker_killed", "10.0.0.2") == {"host_losses_total 10.0.0.2": 1}
    assert left("node_drained", "10.0.0.3") == {}
    reader.event(record(GenerationStarted(2, 40, 1, [[0, 8]], ["node"], [8], "cpu"), 6.0))
    assert left("worker_frozen", "10.0.0.1") == {"host_losses_total 10.0.0.1": 1}
    reader.event(record(GenerationStarted(3, 40, 1, [[0, 8]], ["node"], [8], "cpu"), 5.01))
    assert left("worker_killed", "10.0.0.1") == {}, "parameter servers' workers: a generation for each that is lost"


class Heard(Listener):
    """Reads what it is told as the exporter does, and keeps gauges and counters apart."""

    def __init__(self) -> None:
        self.meter, self.recalled = Meter(Cadence(steps=10)), False
        self.readings: list[Reading] = []

    def steps(self, records: list[dict[str, object]]) -> None:
        self.readings += self.meter.steps(records)

    def event(self, record: dict[str, object]) -> None:
        self.readings += self.meter.event(record)

    def recall(self, events: list[dict[str, object]], newest: list[dict[str, object]]) -> None:
        self.recalled = True
        readings = [r for event in events for r in self.meter.event(event)] + self.meter.steps(newest)
        self.readings += [r for r in readings if not r.metric.counts]


def test_a_coordinator_that_is_started_anew_knows_the_gauges_and_counts_on(tmp_path: Path) -> None:
    plan = toy_plan(shards=8, steps=100)
    first, second = Heard(), Heard()
    journal = Journal(plan, str(tmp_path), "token", "toy", 0.0, False, first)
    journal.generation_begins(GenerationStarted(1, 0, 2, [[0, 4], [4, 8]], ["a", "b"], [1, 2], "cpu"), 0, 0, [])
    journal.steps([step(1), step(2)])
    journal.log(CheckpointSaved(2, 4096, 0.25, 1.5))
    journal.steps([step(2), step(3)])  # the second is known already
    before = values(first.readings)
    assert before["steps_total"] == 3
    assert not first.recalled
    journal = Journal(plan, str(tmp_path), "token", "toy", 0.0, True, second)
    after = values(second.readings)
    assert second.recalled
    gauges = {m.name.removeprefix("orchestrator_") for m in METRICS if not m.counts}
    counted = set(before) - gauges
    assert {k: v for k, v in before.items() if k in gauges} == pytest.approx(after, abs=0.01)
    assert not counted & set(after), "what was counted once is not counted again"
    journal.steps([step(4)])
    assert values(second.readings)["steps_total"] == 1
    assert values(second.readings)["committed_step"] == 4
