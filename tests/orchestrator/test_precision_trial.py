"""--precision auto: what is chosen from which times, that measuring leaves no trace, and that it happens once."""

import dataclasses
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from toys import Outcome, ToyWorkload, run_toy, toy_plan, toy_state

import orchestrator.recorder
from orchestrator.assembly import build
from orchestrator.config import to_toml
from orchestrator.events import Event, PrecisionChosen, record
from orchestrator.group import Group
from orchestrator.injector import Saboteur
from orchestrator.plan import Plan
from orchestrator.recorder import Recorder
from orchestrator.runfolder import CONFIG, RunFolder
from orchestrator.state import weights_sha256
from orchestrator.storage import Folder
from orchestrator.trial import candidates, choose, measure

ALONE = Group(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"fp32": 1.221, "bf16": 1.598}, "fp32"),  # a small BERT, its head at every place, AVX512 without AMX
        ({"fp32": 0.109, "bf16": 0.056}, "bf16"),  # resnet18, 16 images of 32x32, the same CPU
        ({"fp32": 1.0, "bf16": 1.0}, "fp32"),
        ({"fp32": 1.0, "bf16": 0.8}, "fp32"),  # as good as a tie
        ({"fp32": 1.0, "bf16": 0.4, "fp16": 0.39}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.4, "fp16": 0.2}, "fp16"),
        ({"fp32": 1.0, "bf16": 0.9, "fp16": 0.6}, "fp16"),
        ({"fp32": 1.0}, "fp32"),
    ],
)
def test_the_quicker_one_is_chosen_if_it_is_clearly_quicker(seconds, chosen):
    assert choose(seconds) == chosen


def test_measuring_leaves_no_trace():
    plan = toy_plan(precision="auto")
    state = toy_state(plan)
    before = weights_sha256(state.model)
    found = measure(plan, ToyWorkload(plan.config), state.model, ALONE)
    assert list(found) == ["fp32", "bf16"] == candidates(plan, torch.device("cpu"))
    assert all(0 < seconds < 60 for seconds in found.values())
    assert weights_sha256(state.model) == before, "running statistics are among them"
    assert all(p.grad is None for p in state.model.parameters())


def test_a_generation_that_ends_stops_measuring():
    group = Group(0, 1, torch.device("cpu"))
    group.abort()
    plan = toy_plan(precision="auto")
    with pytest.raises(RuntimeError, match="was ended"):
        measure(plan, ToyWorkload(plan.config), toy_state(plan).model, group)


class Notes:
    """In the place of the reporter, which needs Ray: keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


def settled(group: Group, plan: Plan, folder: str, seconds: dict[str, float]) -> tuple[Outcome, str, list[Event]]:
    """A worker that settles the precision, measuring `seconds`, and trains; (outcome, precision, events)."""
    orchestrator.recorder.measure = lambda *_: seconds  # each test has its processes measure what it likes
    recorder = Recorder(plan, folder, None, Saboteur((), lambda _: False))
    recorder.close()
    recorder.reporter = notes = Notes()  # type: ignore[assignment]
    state = toy_state(plan)
    plan = recorder.settle_precision(ToyWorkload(plan.config), state, group)
    assert recorder.store.identity == plan.identity()
    assert state.precision.kind == plan.config.precision
    assert recorder.settle_precision(ToyWorkload(plan.config), state, group) == plan, "the next generation"
    return run_toy(group, plan), plan.config.precision, notes.events


def begun(folder: Path, **given: object) -> tuple[Plan, RunFolder]:
    """A plan that leaves the precision open, and its folder as a command makes it."""
    plan, run = toy_plan(precision="auto", **given), RunFolder(Folder(str(folder)))
    run.folder.write(CONFIG, to_toml(plan.config, "toy").encode())
    return plan, run


@pytest.mark.parametrize(("quick", "world"), [("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_one_measurement_decides_for_all_and_for_ever(tmp_path, quick, world):
    plan, folder = begun(tmp_path)
    seconds = dict.fromkeys(("fp32", "bf16"), 0.5) | {quick: 0.1}
    there = run_distributed(settled, world, plan, str(tmp_path), seconds)
    reference = run_distributed(run_toy, 1, plan.with_config(precision=quick))[0]
    assert [(outcome, kind) for outcome, kind, _ in there] == [(reference, quick)] * world
    assert [events for *_, events in there] == [[PrecisionChosen(quick, seconds)], *[[]] * (world - 1)]
    assert record(there[0][2][0], 0.0)["event"] == "precision_chosen"

    stored = folder.config()
    assert build(type(plan.config), {k: v for k, v in stored.items() if k != "workload"}) == dataclasses.replace(
        plan.config, precision=quick
    )
    # The process was lost with all others before a resumption, and a new one would measure otherwise.
    slow = {"fp32": seconds["bf16"], "bf16": seconds["fp32"]}
    ((outcome, kind, events),) = run_distributed(settled, 1, plan, str(tmp_path), slow)
    assert (outcome, kind, events) == (reference, quick, [])


def test_a_precision_that_was_given_is_not_measured(tmp_path):
    plan, _ = begun(tmp_path)
    ((_, kind, events),) = run_distributed(settled, 1, plan.with_config(precision="bf16"), str(tmp_path), {})
    assert (kind, events) == ("bf16", [])
