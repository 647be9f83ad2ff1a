"""What goes wrong within a step: NaN, fp16 overflow, a killed or frozen worker; and --reduce ddp."""

import os
import signal

import pytest
import torch
from distributed import WorkerDiedError, run_distributed
from toys import Recorder, ToyWorkload, run_toy, run_until_error, toy_plan, toy_state

from orchestrator.evaluate import CHUNK, evaluate
from orchestrator.group import Group
from orchestrator.loop import train
from orchestrator.plan import Plan
from orchestrator.shards import even_placement
from orchestrator.state import TrainingState, weights_sha256
from orchestrator.step import StepTotals


def where_is(plan: Plan, sample: int) -> tuple[int, int]:
    """(step, shard) that first trains on a sample."""
    for step in range(plan.total_steps):
        for shard in range(plan.config.shards):
            if sample in plan.schedule.indices(plan.config.seed, step, shard)[1]:
                return step, shard
    raise AssertionError(sample)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_nan_loss_is_named_on_every_rank(world):
    plan = toy_plan(nan_sample=30)
    step, shard = where_is(plan, 30)
    samples = plan.schedule.indices(plan.config.seed, step, shard)[1].tolist()
    messages = set()
    for message, _, _, done in run_distributed(run_until_error, world, plan):
        assert f"step {step}" in message
        assert f"shard {shard} " in message
        assert str(samples) in message
        assert done == step
        messages.add(message)
    assert len(messages) == 1


@pytest.mark.parametrize("world", [1, 3])
def test_a_nan_loss_leaves_the_weights_of_the_last_step(world):
    """Parameters and buffers: what is saved after the error is the last committed step."""
    for _, before, after, _ in run_distributed(run_until_error, world, toy_plan(nan_sample=30)):
        assert after == before


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("sample_step", [0, 1])
def test_an_fp16_overflow_is_skipped_by_all(optimizer, sample_step):
    """With an overflow in the very first step the optimizer's state is not there yet."""
    plan = toy_plan(precision="fp16", optimizer=optimizer, lr=0.01)
    victim = int(plan.schedule.indices(plan.config.seed, sample_step, 5)[1][0])
    plan = plan.with_config(blow_up=victim)
    (alone,) = run_distributed(run_toy, 1, plan)
    assert alone.finished
    assert alone.scales == [65536.0] * sample_step + [32768.0] * (6 - sample_step)
    assert alone.snapshot["scaler.scale"].item() == 32768.0
    assert torch.isfinite(torch.cat([p.flatten() for n, p in alone.snapshot.items() if p.is_floating_point()])).all()
    for outcome in [*run_distributed(run_toy, 2, plan), *run_distributed(run_toy, 3, plan)]:
        assert outcome.sha256 == alone.sha256
        assert outcome.scales == alone.scales


def one_step(group: Group, plan: Plan) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    state = toy_state(plan)
    before = [p.detach().clone() for p in state.parameters]
    train(
        plan,
        ToyWorkload(plan.config),
        state,
        group,
        even_placement(plan.config.shards, group.world),
        Recorder(),
    )
    return before, [p.detach() for p in state.parameters]


def test_a_skipped_step_changes_no_parameter():
    plan = toy_plan(precision="fp16", steps=1)
    plan = plan.with_config(blow_up=int(plan.schedule.indices(0, 0, 2)[1][0]))
    for before, after in run_distributed(one_step, 2, plan):
        assert all(a.equal(b) for a, b in zip(before, after, strict=True))


class Saboteur(Recorder):
    """Sends itself a signal after a step."""

    def __init__(self, rank: int, victim: int, after: int, number: int) -> None:
        super().__init__()
        self._fires = rank == victim
        self._after, self._number = after, number

    def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
        super().committed(state, totals, lr)
        if self._fires and state.step == self._after:
            os.kill(os.getpid(), self._number)


def lose_a_worker(group: Group, plan: Plan, victim: int, number: int) -> tuple[str, int, dict, str, str]:
    state = toy_state(plan)
    observer = Saboteur(group.rank, victim, 2, number)
    committed = ""
    inner = observer.committed

    def note(state: TrainingState, totals: StepTotals, lr: float) -> None:
        nonlocal committed
        committed = weights_sha256(state.model)
        inner(state, totals, lr)

    observer.committed = note
    try:
        train(plan, ToyWorkload(plan.config), state, group, even_placement(8, group.world), observer)
    except RuntimeError as error:
        return str(error), state.step, state.snapshot(), weights_sha256(state.model), committed
    raise AssertionError("nobody was missed")


@pytest.mark.parametrize("world", [2, 3])
def test_survivors_of_a_kill_raise_and_go_on_to_the_same_weights(world):
    """SIGKILL after step 2 of 6; the survivor's state then goes on alone, as if nothing had happened."""
    plan = toy_plan(optimizer="adam", lr=0.01)
    outcomes = run_distributed(lose_a_worker, world, plan, world - 1, signal.SIGKILL, errors=True)
    assert isinstance(outcomes[-1], WorkerDiedError)
    (reference,) = run_distributed(run_toy, 1, plan)
    for message, step, snapshot, weights, committed in outcomes[:-1]:
        assert message
        assert step == 2
        assert weights == committed, "the step that was not committed left traces in the model"
        (resumed,) = run_distributed(run_toy, 1, plan, None, (step, snapshot))
        assert resumed.sha256 == reference.sha256


def test_a_frozen_worker_is_found_by_the_group_timeout():
    survivor, frozen = run_distributed(
        lose_a_worker, 2, toy_plan(), 1, signal.SIGSTOP, group_timeout_s=3.0, errors=True, lost=(1,)
    )
    assert isinstance(frozen, WorkerDiedError)
    message, step, *_ = survivor
    assert "timed out" in message.lower(), message
    assert step == 2


def raise_on_rank_1(group: Group) -> int:
    if group.rank == 1:
        raise ValueError("rank 1 says no")
    return group.rank


def test_the_helper_itself_tells_who_failed():
    assert run_distributed(raise_on_rank_1, 1) == [0]
    first, second = run_distributed(raise_on_rank_1, 2, errors=True)
    assert first == 0
    assert isinstance(second, ValueError)
    with pytest.raises(ValueError, match="rank 1 says no"):
        run_distributed(raise_on_rank_1, 2)


def evaluate_only(group: Group, plan: Plan) -> dict[str, float]:
    state = toy_state(plan)
    metrics = evaluate(ToyWorkload(plan.config), state.model, state.precision, group, 0)
    assert state.model.training
    return metrics


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_is_the_same_for_any_number_of_workers(precision):
    """150 samples are three chunks: the fourth and fifth worker have none."""
    plan = toy_plan(precision=precision)
    assert -(-plan.heldout_samples // CHUNK) == 3
    found = [m for world in (1, 2, 3, 4, 5) for m in run_distributed(evaluate_only, world, plan)]
    assert len(found) == 15
    assert all(metrics == found[0] for metrics in found)
    assert 0 < found[0]["accuracy"] < 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ddp_trains_and_its_ranks_agree(world):
    plan = toy_plan(reduce="ddp", ragged=False, epochs=15, optimizer="adam", lr=0.01)
    outcomes = run_distributed(run_toy, world, plan)
    assert len({o.sha256 for o in outcomes}) == 1
    assert all(o.metrics == outcomes[0].metrics for o in outcomes)
    assert sum(outcomes[0].losses[-3:]) < 0.8 * sum(outcomes[0].losses[:3])


def test_a_batch_without_any_item_is_refused_or_harmless():
    """Masked tokens may be few; a batch with none must not end in a ZeroDivisionError."""
    (outcome,) = run_distributed(run_toy, 1, toy_plan(items="none", steps=1), errors=True)
    assert not isinstance(outcome, ZeroDivisionError), "division by zero in the step's totals"


def test_a_piece_of_an_evaluation_may_take_longer_than_steps_do():
    """Its worker is judged by the limit for those that read, and gets on with every piece."""
    plan, seen = toy_plan(), []
    workload, state = ToyWorkload(plan.config), toy_state(plan)
    group = Group(0, 1, torch.device("cpu"))
    sums = workload.sums

    def watched(model, batch):
        seen.append((group.clock.reading, group.clock.told(group.place)["place"]))
        return sums(model, batch)

    workload.sums = watched
    evaluate(workload, state.model, state.precision, group, 0)
    places = [place for reading, place in seen if reading]
    assert len(places) == len(seen) == -(-len(workload.samples("heldout")) // CHUNK)
    assert places == sorted(set(places))
    assert not group.clock.reading
