"""The learning rate, how many workers fit a cluster, the plan's identity, and errors that travel."""

import inspect
import itertools
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import errors
from orchestrator.assembly import build
from orchestrator.cluster_fit import Node, capacity, choose_workers, declared_speed, matches, where
from orchestrator.config import RunConfig
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.events import CheckpointSaved, RunEnded, record
from orchestrator.plan import Plan
from orchestrator.resume import fewer
from orchestrator.schedule import learning_rate
from orchestrator.settings import settings
from orchestrator.values import WorkerRange
from workloads.bert.config import BertConfig
from workloads.resnet.config import ResnetConfig

SCHEDULES = ("cosine", "step", "linear", "constant")


def config(**given: object) -> RunConfig:
    return build(RunConfig, {"steps": 90, **given})


@given(
    st.sampled_from(SCHEDULES),
    st.floats(0, 1),
    st.floats(0, 1e3),
    st.integers(1, 10_000),
    st.floats(0, 1, exclude_max=True),
)
def test_the_rate_is_between_zero_and_the_peak(schedule, warmup, lr, total, share):
    settled = config(schedule=schedule, warmup=warmup, lr=lr)
    step = int(share * total)
    rate = learning_rate(settled, step, total)
    assert 0 <= rate <= math.nextafter(lr, math.inf)  # lr * warm / warm may be one ulp off
    assert rate == learning_rate(settled, step, total)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_evenly_to_the_peak(schedule):
    settled = config(schedule=schedule, warmup=0.1, lr=1.0)
    rates = [learning_rate(settled, step, 100) for step in range(100)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("schedule", "landmarks"),
    [
        ("cosine", {0: 1.0, 30: 0.75, 45: 0.5, 60: 0.25}),
        ("linear", {0: 1.0, 9: 0.9, 45: 0.5, 81: 0.1}),
        ("step", {0: 1.0, 29: 1.0, 30: 0.1, 59: 0.1, 60: 0.01, 79: 0.01, 80: 0.001, 89: 0.001}),
        ("constant", {0: 1.0, 89: 1.0}),
    ],
)
def test_the_rate_at_landmarks(schedule, landmarks):
    settled = config(schedule=schedule, lr=1.0)
    assert {s: learning_rate(settled, s, 90) for s in landmarks} == pytest.approx(landmarks)


NODES = [
    Node({"CPU": 8.0, "GPU": 2.0}, {"zone": "a", "spot": "yes"}),
    Node({"CPU": 3.5, "GPU": 1.0}, {"zone": "b"}),
    Node({"CPU": 1.0}, {"zone": "a"}),
]


@pytest.mark.parametrize(
    ("placement", "per_worker", "labels", "fits"),
    [
        ("pack", {"CPU": 1.0}, {}, 12),
        ("spread", {"CPU": 1.0}, {}, 12),
        ("strict-pack", {"CPU": 1.0}, {}, 8),
        ("strict-spread", {"CPU": 1.0}, {}, 3),
        ("pack", {"CPU": 2.0}, {}, 5),
        ("strict-spread", {"CPU": 2.0}, {}, 2),
        ("pack", {"GPU": 1.0, "CPU": 4.0}, {}, 2),
        ("pack", {"GPU": 0.5, "CPU": 1.0}, {}, 6),
        ("pack", {"CPU": 0.1}, {"zone": "b"}, 35),
        ("pack", {"CPU": 1.0}, {"zone": "a"}, 9),
        ("pack", {"CPU": 1.0}, {"zone": "!a"}, 3),
        ("pack", {"CPU": 1.0}, {"zone": "in(a,b)"}, 12),
        ("pack", {"CPU": 1.0}, {"zone": "!in(a,b)"}, 0),
        ("pack", {"CPU": 1.0}, {"zone": "a", "spot": "!yes"}, 1),
        ("strict-pack", {"CPU": 1.0}, {"zone": "c"}, 0),
        ("pack", {"TPU": 1.0}, {}, 0),
        ("pack", {"CPU": 1.0, "GPU": 0.0}, {}, 12),
    ],
)
def test_capacity(placement, per_worker, labels, fits):
    assert capacity(NODES, per_worker, placement, labels) == fits


def test_where_workers_are_expected():
    one = {"CPU": 1.0}
    assert where(NODES, one, "pack", {}, 9) == [0] * 8 + [1]
    assert where(NODES, one, "spread", {}, 5) == [0, 0, 1, 1, 2]
    assert where(NODES, one, "strict-spread", {}, 2) == [0, 1]
    assert where(NODES, one, "strict-pack", {}, 3) == [0, 0, 0]
    assert where(NODES, one, "pack", {"zone": "a"}, 9) == [0] * 8 + [2]


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.integers(1, 20),
    st.sampled_from(["pack", "spread", "strict-pack", "strict-spread"]),
)
def test_where_workers_are_expected_they_fit(cpus, workers, placement):
    nodes, one = [Node({"CPU": float(count)}, {}) for count in cpus], {"CPU": 1.0}
    found = where(nodes, one, placement, {}, workers)
    assert len(found) == min(workers, capacity(nodes, one, placement, {}))
    assert all(found.count(number) <= count for number, count in enumerate(cpus))
    assert found == sorted(found)
    if placement.startswith("strict") and found:
        assert len(set(found)) == (1 if placement == "strict-pack" else len(found))


@pytest.mark.parametrize(("workers", "chosen"), [("1:8", 3), ("5:8", 5), ("6", 6)])
def test_what_others_use_is_waited_for_only_up_to_the_minimum(workers, chosen):
    nodes = [Node({"CPU": 4.0}, {}, free={"CPU": 1.0}), Node({"CPU": 4.0}, {}, free={"CPU": 2.0})]
    assert choose_workers(config(workers=workers, shards=8), {"CPU": 1.0}, nodes) == chosen


def test_declared_speeds():
    assert declared_speed({"orchestrator-speed": "2.5", "ray.io/accelerator-type": "T4"}) == 2.5
    assert declared_speed({"ray.io/accelerator-type": "T4"}) == 65.0
    assert declared_speed({"ray.io/accelerator-type": "not-yet-made"}) == 0.0
    assert declared_speed({"orchestrator-speed": "fast"}) == 0.0


def test_labels_that_a_node_lacks():
    assert not matches({}, {"zone": "a"})
    assert matches({}, {"zone": "!a"})
    assert matches({"zone": "a"}, {})


@pytest.mark.parametrize(
    ("workers", "placement", "chosen"),
    [("1:8", "pack", 8), ("12", "pack", 12), ("1:64", "pack", 12), ("2:64", "strict-spread", 3)],
)
def test_as_many_workers_as_fit(workers, placement, chosen):
    settled = config(workers=workers, placement=placement, shards=64)
    assert choose_workers(settled, {"CPU": 1.0}, NODES) == chosen


@pytest.mark.parametrize(
    ("given_settings", "per_worker", "advice"),
    [
        ({"workers": "16"}, {"CPU": 1.0}, "--workers 12 would fit"),
        ({"workers": "4", "placement": "strict-spread"}, {"CPU": 1.0}, "--workers 3 would fit"),
        ({"workers": "9", "placement": "strict-pack"}, {"CPU": 1.0}, "--workers 8 would fit"),
        ({"workers": "25"}, {"CPU": 1.0}, "--resources-per-worker CPU=0.5"),
        ({"workers": "4"}, {"GPU": 1.0}, "--workers 3 would fit"),
        ({"workers": "1", "node_labels": "zone=c"}, {"CPU": 1.0}, "with labels zone=c"),
        ({"workers": "1"}, {"TPU": 1.0}, "no worker fits"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(given_settings, per_worker, advice):
    settled = config(shards=64, **given_settings)
    with pytest.raises(UserError) as refusal:
        choose_workers(settled, per_worker, NODES)
    message = str(refusal.value)
    assert advice in message
    assert message.startswith(f"--workers {given_settings['workers']}: ")
    assert "\n" not in message


@given(st.integers(1, 64), st.integers(1, 6), st.sampled_from(["pack", "strict-pack", "strict-spread"]))
def test_the_advice_works(minimum, cpus, placement):
    """Whoever does what the refusal says is not refused again."""
    nodes = [Node({"CPU": float(cpus)}, {})] * 2
    settled = config(workers=str(minimum), shards=64, placement=placement)
    try:
        assert choose_workers(settled, {"CPU": 1.0}, nodes) == minimum
    except UserError as refusal:
        words = str(refusal).replace(",", " ").split()
        advised = words.index("would")
        fewer = words[advised - 1]
        assert choose_workers(config(workers=fewer, shards=64, placement=placement), {"CPU": 1.0}, nodes) == int(fewer)
        for word in words[advised:]:
            if word.startswith("CPU="):
                assert choose_workers(settled, {"CPU": float(word[4:])}, nodes) == minimum


ERRORS = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, OrchestratorError)]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(kind, protocol):
    error = kind("--workers 8:4: the minimum exceeds the maximum")
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args
    assert again.exit_status == (2 if issubclass(kind, UserError) else 1)


def plan(**given: object) -> Plan:
    return Plan("toy", config(**given), 100, 10, "abc")


def test_the_identity_is_of_what_decides_the_result():
    other = {
        "seed": 1,
        "lr": 0.5,
        "shards": 16,
        "batch_size": 128,
        "steps": 91,
        "precision": "bf16",
        "threads": 2,
    }
    for name, value in other.items():
        assert plan(**{name: value}).identity() != plan().identity(), name
    free = {"workers": "3", "name": "x", "storage": "/y", "placement": "spread", "keep_checkpoints": 9}
    free |= {"checkpoint_every": "7", "max_incidents": 1, "address": "a", "resources_per_worker": "CPU=2"}
    assert plan(**free).identity() == plan().identity()
    decided = {n for n, f in settings(RunConfig).items() if f.metadata["result"]}
    assert decided & set(free) == set()
    assert set(other) <= decided
    assert Plan("toy", config(), 100, 10, "abd").identity() != plan().identity()
    assert Plan("yot", config(), 100, 10, "abc").identity() != plan().identity()


def test_a_version_with_other_arithmetic_does_not_go_on_with_a_run(monkeypatch):
    before = plan().identity()
    monkeypatch.setattr(RunConfig, "arithmetic", 2)
    assert plan().identity() != before
    monkeypatch.undo()
    assert ResnetConfig().arithmetic == 1, "as runs of before have it"


@pytest.mark.parametrize(
    ("settled", "arithmetic"),
    [({}, 2), ({"accelerator": "cpu"}, 2), ({"dropout": 0.0}, 1), ({"accelerator": "cuda"}, 1)],
)
def test_what_draws_as_before_is_gone_on_with(settled, arithmetic):
    assert BertConfig(**settled).arithmetic == arithmetic


def test_the_length_of_a_plan():
    assert plan(steps=7).total_steps == 7
    by_epochs = Plan("toy", build(RunConfig, {"epochs": 3, "eval_every": 2}), 100, 10, "")
    assert by_epochs.schedule.steps_per_epoch == 2
    assert by_epochs.total_steps == 6
    assert [s for s in range(1, 7) if by_epochs.evaluates_after(s)] == [4]
    for part, steps in ((0.5, [2, 4, 6, 8]), (0.6, [3, 6, 9]), (0.01, list(range(1, 10))), (1, [5]), (0, [])):
        often = Plan("toy", build(RunConfig, {"epochs": 2, "eval_every": part}), 300, 10, "")
        assert [s for s in range(1, 11) if often.evaluates_after(s)] == steps
    assert [by_epochs.epoch_of(s) for s in range(6)] == [0, 0, 1, 1, 2, 2]


def test_event_records():
    assert record(RunEnded("finished", 9, ""), 1.23456) == {
        "time_s": 1.235,
        "event": "run_ended",
        "status": "finished",
        "step": 9,
        "reason": "",
    }
    assert record(CheckpointSaved(1, 2, 0.1, 0.2), 0.0)["event"] == "checkpoint_saved"


@pytest.mark.parametrize(("text", "low", "high"), [("4", 4, 4), ("1:4", 1, 4), (" 2:2 ", 2, 2)])
def test_worker_ranges(text, low, high):
    assert WorkerRange.parse(text) == WorkerRange(low, high)
    assert WorkerRange.parse(str(WorkerRange(low, high))) == WorkerRange(low, high)


@pytest.mark.parametrize(
    ("workers", "size", "tried", "found"),
    [("1:8", "ddp", 5, 2), ("3:8", "ddp", 5, 3), ("2:8", "tensor=2", 6, 2), ("1:8", "ddp", 1, 1), ("4", "ddp", 4, 4)],
)
def test_a_start_that_found_no_room_is_tried_with_fewer(workers, size, tried, found):
    """Four GPUs and as many shares of others: five fit by the sum, and Ray has room for four."""
    assert fewer(config(workers=workers, parallel=size, shards=8), tried) == found
