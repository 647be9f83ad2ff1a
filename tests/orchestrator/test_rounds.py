"""Rounds of local steps: the same bits for any number of workers, and what local-sgd and diloco mean."""

import dataclasses

import pytest
import torch
from distributed import run_distributed
from toys import RoundRecorder, ToyWorkload, run_toy, toy_plan, toy_state

from orchestrator.errors import NonFiniteLossError
from orchestrator.group import Group
from orchestrator.plan import Plan
from orchestrator.rounds import Rounds, _make_optimizer_state, train
from orchestrator.shards import even_placement
from orchestrator.state import weights_sha256

RECIPES = {
    "local-sgd": {"sync": "local-sgd", "local_steps": 4},
    "local-sgd adamw": {"sync": "local-sgd", "local_steps": 5, "optimizer": "adamw", "clip_norm": 0.5, "lr": 0.01},
    "diloco": {"sync": "diloco", "local_steps": 4, "optimizer": "adamw", "lr": 0.01, "precision": "bf16"},
}


@dataclasses.dataclass
class Trained:
    sha256: str
    losses: list[float]
    step: int
    evaluations: list[tuple[int, dict[str, float]]]
    snapshot: dict[str, torch.Tensor] = dataclasses.field(compare=False)


def run_rounds(group: Group, plan: Plan, start=None, stop_after: int = 0) -> Trained:
    """Train, from the start or from (step, snapshot) that rank 0 has and hands to the others."""
    workload, state = ToyWorkload(plan.config), toy_state(plan)
    if start and group.rank == 0:
        state.load(start[1], start[0])
    if start:
        state.receive(group)
    recorder = RoundRecorder(stop_after).starts_at(state.step)
    train(plan, workload, state, group, even_placement(plan.config.shards, group.world), recorder)
    return Trained(weights_sha256(state.model), recorder.losses, state.step, recorder.evaluations, state.snapshot())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_optimizer_begins_with_nothing(optimizer):
    """Its state is made before the first step; weight decay alone would leave something in it."""
    state = toy_state(toy_plan(optimizer=optimizer, weight_decay=0.1))
    _make_optimizer_state(state)
    entries = [t for p in state.parameters for t in state.optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert len(entries) >= len(list(state.parameters))
    assert not any(t.any() for t in entries)


def alone() -> Group:
    return Group(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_weights_do_not_depend_on_the_workers(recipe):
    """14 steps of 3 an epoch, the last of which leaves shards empty: rounds end in the middle of epochs."""
    plan = toy_plan(**RECIPES[recipe], steps=14, eval_every=2)
    expected = run_distributed(run_rounds, 1, plan)[0]
    assert expected.step == len(expected.losses) == 14
    assert [step for step, _ in expected.evaluations] == ([8, 12] if plan.config.local_steps == 4 else [10])
    for world in (2, 3):
        assert run_distributed(run_rounds, world, plan) == [expected] * world


@pytest.mark.parametrize("recipe", RECIPES)
def test_nor_on_a_stop_and_another_number_of_workers(recipe):
    plan = toy_plan(**RECIPES[recipe], steps=14)
    expected = run_distributed(run_rounds, 1, plan)[0]
    first = run_distributed(run_rounds, 2, plan, None, 1)[0]
    assert first.step == plan.config.local_steps
    for rest in run_distributed(run_rounds, 3, plan, (first.step, first.snapshot)):
        assert rest.sha256 == expected.sha256
        assert first.losses + rest.losses == expected.losses


def test_one_local_step_without_momentum_is_a_step():
    """The average after one step of plain SGD is the step of the average gradient; here every item counts alike."""
    common = {"norm": False, "momentum": 0.0, "steps": 2, "batch_size": 16, "ragged": False, "items": "varying"}
    step = run_toy(alone(), toy_plan(**common)).snapshot
    begin = toy_state(toy_plan(**common)).snapshot()
    averaged = run_rounds(alone(), toy_plan(**common, sync="local-sgd", local_steps=1)).snapshot
    one, other = [
        torch.cat([(s[n] - begin[n]).flatten() for n in begin if n.startswith("model.")]) for s in (step, averaged)
    ]
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.95


def test_an_outer_step_of_1_without_momentum_is_the_average():
    common = {"steps": 8, "local_steps": 4}
    average = run_rounds(alone(), toy_plan(**common, sync="local-sgd"))
    outer = run_rounds(alone(), toy_plan(**common, sync="diloco", outer_lr=1.0, outer_momentum=0.0))
    assert outer.sha256 == average.sha256
    assert run_rounds(alone(), toy_plan(**common, sync="diloco")).sha256 != average.sha256


def test_the_outer_step_is_torch_s_nesterov():
    plan = toy_plan(sync="diloco", local_steps=4, steps=12, outer_momentum=0.9)
    state = toy_state(plan)
    rounds = Rounds(plan, ToyWorkload(plan.config), state, alone(), even_placement(8, 1))
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in state.parameters]
    nesterov = torch.optim.SGD(theirs, lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(3):
        rounds.compute(False)
        mean = rounds._reducer.extra[rounds._head :][: sum(p.numel() for p in theirs)] / 8
        for p, part in zip(theirs, mean.split([p.numel() for p in theirs]), strict=True):
            p.grad = part.view(p.shape).clone()
        nesterov.step()
        rounds.commit()
        for p, ours in zip(theirs, state.parameters, strict=True):
            torch.testing.assert_close(p, ours, rtol=1e-5, atol=1e-6)
    rounds.close()


def test_a_loss_that_is_not_finite_is_named_and_nothing_is_kept_of_its_round():
    plan = toy_plan(sync="local-sgd", local_steps=2, steps=6, nan_sample=11)
    state, recorder = toy_state(plan), RoundRecorder()
    before = weights_sha256(state.model)
    with pytest.raises(NonFiniteLossError, match=r"in shard \d: samples .*\b11\b"):
        train(plan, ToyWorkload(plan.config), state, alone(), even_placement(8, 1), recorder)
    assert not recorder.losses or state.step % 2 == 0
    assert recorder.losses or weights_sha256(state.model) == before
