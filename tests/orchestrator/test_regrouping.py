"""Training whose generations end in the middle of a step, and goes on in the same processes: gloo, no coordinator."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from stage import CPU, SOON_S, TIMEOUT_S, WAIT, Stage, aborted, on_machine
from toys import Recorder, ToyWorkload, run_toy, toy_plan, toy_state

from orchestrator.evaluate import evaluate
from orchestrator.group import Group, PeerLostError
from orchestrator.loop import train
from orchestrator.plan import Plan
from orchestrator.shards import even_placement
from orchestrator.state import TrainingState, weights_sha256
from orchestrator.step import StepTotals
from workloads.workload import Batch, Sums


class Watcher(Recorder):
    """Knows the weights of the last committed step; calls `after_step` when that many are done."""

    def __init__(self, state: TrainingState, after: int = 0, then: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.weights, self._after, self._then = weights_sha256(state.model), after, then

    def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
        super().committed(state, totals, lr)
        self.weights = weights_sha256(state.model)
        if state.step == self._after:
            self._then()


def go_on(stage: Stage, plan: Plan, state: TrainingState) -> str:
    """Generation 2, with the ranks turned round but the newest state first; the final weights."""
    stage.tell("step", state.step)
    steps = [int(step) for step in stage.everyone("step")]
    order = sorted(range(stage.world), key=lambda rank: (-steps[rank], -rank))
    group = stage.next(2, rank=order.index(stage.rank))
    state.receive(group)
    assert state.step == max(steps)
    train(plan, ToyWorkload(plan.config), state, group, even_placement(plan.config.shards, group.world), Recorder())
    stage.end(group)
    return weights_sha256(state.model)


def freeze(group: Group, plan: Plan, apart: bool = False) -> tuple[float, int, bool, str]:
    """The last rank is stopped after step 2; the others are told, and finish the run with it when it is back."""
    with on_machine(group.rank if apart else 0):
        return _freeze(group, plan)


def _freeze(group: Group, plan: Plan) -> tuple[float, int, bool, str]:
    stage, state = Stage(group, 2), toy_state(plan)
    stage.tell("pid", os.getpid())
    pid = int(stage.everyone("pid")[-1])
    stopped = lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "T"  # noqa: E731
    first, victim = stage.next(1), os.getpid() == pid
    watcher = Watcher(state, 2 if victim else -1, lambda: os.kill(pid, signal.SIGSTOP))
    everyone = even_placement(plan.config.shards, first.world)
    seen = lambda: stopped() and first.waiting  # noqa: E731
    told = nullcontext([0.0]) if victim else aborted(first, seen)
    with told as seconds, pytest.raises(RuntimeError) as lost:
        train(plan, ToyWorkload(plan.config), state, first, everyone, watcher)
    assert first.excuses(lost.value)
    first.close()
    stage.tell("free")
    if stage.rank == 0:
        stage.control.wait([f"free-{rank}" for rank in range(stage.world - 1)], WAIT)
        os.kill(pid, signal.SIGCONT)
    clean = weights_sha256(state.model) == watcher.weights
    return seconds[0], state.step, clean, go_on(stage, plan, state)


@pytest.mark.parametrize(("world", "apart"), [(2, False), (3, False), (3, True)])
def test_after_a_frozen_peer_the_same_processes_go_on_to_the_same_weights(world, apart):
    plan = toy_plan(optimizer="adam", lr=0.01, clip_norm=0.5)
    (reference,) = run_distributed(run_toy, 1, plan)
    outcomes = run_distributed(freeze, world, plan, apart, group_timeout_s=TIMEOUT_S)
    assert all(seconds < SOON_S for seconds, *_ in outcomes)
    assert any(seconds > 0 for seconds, *_ in outcomes), "nobody waited"
    for _, step, clean, weights in outcomes:
        assert step == 2
        assert clean, "the step that was not committed left traces in the model"
        assert weights == reference.sha256


def test_after_a_frozen_peer_ddp_goes_on_too():
    """Its errors are torch's own; its bits are not promised, but its ranks agree."""
    outcomes = run_distributed(freeze, 2, toy_plan(reduce="ddp", ragged=False))
    assert [step for _, step, *_ in outcomes] == [2, 2]
    assert outcomes[0][0] < SOON_S
    assert all(clean for _, _, clean, _ in outcomes)
    assert outcomes[0][3] == outcomes[1][3]


class Interrupted(ToyWorkload):
    """Ends the generation while it computes its `at`-th shard or chunk."""

    def __init__(self, plan: Plan, group: Group, at: int) -> None:
        super().__init__(plan.config)
        self._group, self._left = group, at

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        self._left -= 1
        if not self._left:
            self._group.abort()
        return super().sums(model, batch)


def end_between_shards(group: Group, plan: Plan, at: int) -> tuple[int, bool, float, str]:
    stage, state = Stage(group, 2), toy_state(plan)
    first, watcher = stage.next(1), Watcher(state)
    workload = Interrupted(plan, first, at if stage.rank == stage.world - 1 else -1)
    with pytest.raises(PeerLostError):
        train(plan, workload, state, first, even_placement(8, first.world), watcher)
    first.close()
    clean = weights_sha256(state.model) == watcher.weights
    momentum = state.model.bn.momentum
    return state.step, clean, momentum, go_on(stage, plan, state)


@pytest.mark.parametrize(("world", "at", "step"), [(1, 1, 0), (1, 11, 1), (2, 2, 0), (2, 6, 1), (3, 4, 1)])
def test_a_generation_that_ends_between_shards_leaves_no_trace(world, at, step):
    """Each forward pass overwrites the running statistics of batch normalization."""
    plan = toy_plan(precision="fp16", weight_decay=0.01)
    (reference,) = run_distributed(run_toy, 1, plan)
    for done, clean, momentum, weights in run_distributed(end_between_shards, world, plan, at):
        assert done == step
        assert clean
        assert momentum == 0.1
        assert weights == reference.sha256


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_generation_of_ddp_that_ends_in_a_pass_leaves_no_trace(at):
    """The forward pass has counted a batch on who computed it by then, and only there."""
    outcomes = run_distributed(end_between_shards, 2, toy_plan(reduce="ddp", ragged=False), at)
    assert [step for step, *_ in outcomes] == [at - 1] * 2
    assert all(clean for _, clean, *_ in outcomes)
    assert outcomes[0][3] == outcomes[1][3]


def end_evaluation(group: Group, plan: Plan) -> tuple[dict[str, float], str, str]:
    stage, state = Stage(group, 2), toy_state(plan)
    first, before = stage.next(1), weights_sha256(state.model)
    workload = Interrupted(plan, first, 1 if stage.rank == stage.world - 1 else -1)
    with pytest.raises(PeerLostError):
        evaluate(workload, state.model, state.precision, first, 0)
    first.close()
    second, after = stage.next(2), weights_sha256(state.model)
    metrics = evaluate(ToyWorkload(plan.config), state.model, state.precision, second, 0)
    stage.end(second)
    return metrics, before, after


def test_an_evaluation_ends_with_its_generation():
    """Between two chunks on one worker; on two, one of which waits for the other."""
    found = [*run_distributed(end_evaluation, 1, toy_plan()), *run_distributed(end_evaluation, 2, toy_plan())]
    for metrics, before, after in found:
        assert metrics == found[0][0]
        assert 0 < metrics["accuracy"] < 1
        assert before == after


def hand_over(group: Group, plan: Plan) -> tuple[dict[str, torch.Tensor], float, int, int, str]:
    """Ranks 0 and 1 have four steps, rank 2 has two, rank 3 has none."""
    state, workload = toy_state(plan), ToyWorkload(plan.config)
    if steps := (4, 4, 2, 0)[group.rank]:
        train(plan, workload, state, Group(0, 1, CPU), even_placement(8, 1), Recorder(stop_after=steps))
    assert state.step == steps
    if group.rank == 0:
        state.evaluated_step = 3
    if group.rank == 1:
        state.model.never.data.fill_(7.0)
    state.receive(group)
    kept, received = state.model.never[0].item(), state.snapshot()
    state.model.never.data.fill_(1.0)
    step, evaluated = state.step, state.evaluated_step
    train(plan, workload, state, group, even_placement(8, group.world), Recorder())
    return received, kept, step, evaluated, weights_sha256(state.model)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "adam", "lr": 0.01, "clip_norm": 0.5},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0, "precision": "fp16"},
    ],
    ids=lambda given: given["optimizer"],
)
def test_the_newest_state_is_handed_to_who_has_less(given):
    plan = toy_plan(**given)
    overflows = plan.config.precision == "fp16"
    if overflows:
        plan = plan.with_config(blow_up=int(plan.schedule.indices(plan.config.seed, 1, 5)[1][0]))
    (reference,) = run_distributed(run_toy, 1, plan)
    first, *others = run_distributed(hand_over, 4, plan)
    assert any(name.startswith("optimizer.") and tensor.abs().sum() > 0 for name, tensor in first[0].items())
    assert not overflows or first[0]["scaler.scale"].item() == 32768.0, "half of what it begins with"
    for rank, (received, kept, step, evaluated, weights) in enumerate([first, *others]):
        assert received.keys() == first[0].keys()
        assert all(received[name].equal(first[0][name]) for name in received if name != "model.never")
        assert kept == (7.0 if rank == 1 else 1.0), "who has the step keeps its own"
        assert (step, evaluated) == (4, 3)
        assert weights == reference.sha256


def begin_mixed(group: Group, plan: Plan, kinds: list[str]) -> list[str]:
    """Each machine draws other initial weights; before and after one was told of another's."""
    state = toy_state(plan)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter += group.rank
    found = [weights_sha256(state.model)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("orchestrator.state.kind_of", lambda device: kinds[group.rank])
        state.receive(group)
    assert state.step == 0
    return [*found, weights_sha256(state.model)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("kinds", "alike"), [(["a", "a", "b"], True), (["a", "a", "a"], False)])
def test_machines_of_several_kinds_begin_with_the_weights_of_one(optimizer, kinds, alike):
    """They may draw otherwise; those of one kind do not, and nothing is sent."""
    found = run_distributed(begin_mixed, 3, toy_plan(optimizer=optimizer), kinds)
    before, after = zip(*found, strict=True)
    assert len(set(before)) == 3
    assert after == ((before[0],) * 3 if alike else before)
