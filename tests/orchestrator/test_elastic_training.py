"""The same weights, bit by bit, for every number of workers, every placement and every history of them."""

import pytest
from distributed import run_distributed
from toys import Outcome, run_toy, toy_plan

from orchestrator.shards import placement_from_counts

RECIPES = {
    "sgd": {"optimizer": "sgd", "weight_decay": 0.01},
    "nesterov": {"optimizer": "nesterov", "weight_decay": 0.01},
    "sgd clipped": {"optimizer": "sgd", "clip_norm": 0.5},
    "adam clipped": {"optimizer": "adam", "lr": 0.01, "clip_norm": 0.5, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "decay": "matrices"},
}
REFERENCES: dict[str, Outcome] = {}


def reference(**given: object) -> Outcome:
    """The run on one worker, computed once."""
    key = repr(sorted(given.items()))
    if key not in REFERENCES:
        REFERENCES[key] = run_distributed(run_toy, 1, toy_plan(**given))[0]
    return REFERENCES[key]


def check(given: dict[str, object], world: int, **how: object) -> None:
    for outcome in run_distributed(run_toy, world, toy_plan(**given), *how.values()):
        assert outcome == reference(**given)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_weights_do_not_depend_on_the_workers(recipe, precision, world):
    check({**RECIPES[recipe], "precision": precision}, world)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_nor_with_four_shards_and_one_sample_left_over(world):
    """75 samples in microbatches of 2: the last sample is alone and joins the one before."""
    check({"shards": 4, "batch_size": 8, "steps": 20}, world)


def test_nor_with_one_shard_a_worker():
    check({"shards": 2, "batch_size": 32}, 2)


@pytest.mark.parametrize("world", [2, 3])
def test_nor_without_batch_normalization(world):
    check({"norm": False}, world)


@pytest.mark.parametrize("counts", [(7, 1), (1, 7), (3, 5), (1, 6, 1), (2, 2, 4), (1, 1, 1, 5), (4, 1, 1, 1, 1)])
def test_nor_on_uneven_placements(counts):
    check(RECIPES["adam clipped"], len(counts), placement=placement_from_counts(counts))


def test_training_learns_and_the_configuration_matters():
    """Equality means something only if the runs could have differed."""
    first = reference(**RECIPES["sgd"])
    assert first.finished
    assert first.step == 6
    assert reference(**RECIPES["sgd"], seed=1).sha256 != first.sha256
    assert len({reference(**RECIPES["sgd"], precision=p).sha256 for p in ("fp32", "bf16", "fp16")}) == 3
    longer = reference(**RECIPES["adamw"], epochs=20)
    assert longer.losses[-1] < 0.8 * longer.losses[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_change_of_workers_at_any_step_changes_nothing(stop_after, precision):
    """Stop after any step, the tail of an epoch included; go on from the snapshot with other workers."""
    given = {**RECIPES["adam clipped"], "precision": precision}
    plan = toy_plan(**given)
    first = run_distributed(run_toy, 3, plan, None, None, stop_after)
    assert {o.step for o in first} == {stop_after}
    assert not any(o.finished for o in first)
    start = (stop_after, first[0].snapshot)
    for second in run_distributed(run_toy, 2, plan, placement_from_counts((6, 2)), start):
        assert second.sha256 == reference(**given).sha256
        assert first[0].losses + second.losses == reference(**given).losses
        assert second.metrics == reference(**given).metrics


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_worker_may_begin_at_a_step_in_which_it_has_no_samples(precision):
    """Step 2 has 11 samples in microbatches of 4: shards 3 to 7 are empty, and all shards of rank 1."""
    given = {**RECIPES["sgd"], "precision": precision}
    plan = toy_plan(**given)
    assert plan.schedule.samples_in_step(2) == 11
    first = run_distributed(run_toy, 1, plan, None, None, 2)[0]
    for second in run_distributed(run_toy, 2, plan, None, (2, first.snapshot)):
        assert second.sha256 == reference(**given).sha256


def test_a_joiner_receives_the_state_bit_by_bit():
    plan = toy_plan(**RECIPES["adam clipped"], precision="fp16")
    first = run_distributed(run_toy, 1, plan, None, None, 3)[0]
    for outcome in run_distributed(
        run_toy, 3, toy_plan(**RECIPES["adam clipped"], precision="fp16", steps=3), None, (3, first.snapshot)
    ):
        assert outcome.snapshot.keys() == first.snapshot.keys()
        assert all(outcome.snapshot[name].equal(first.snapshot[name]) for name in first.snapshot)


def test_a_stop_asked_for_in_the_last_step_is_the_end():
    (outcome,) = run_distributed(run_toy, 1, toy_plan(steps=2), None, None, 2)
    assert outcome.finished


@pytest.mark.parametrize(("every", "steps"), [(1, [3]), (0.5, [2, 4]), (0.01, [1, 2, 3, 4, 5])])
@pytest.mark.parametrize("world", [1, 2])
def test_evaluations_on_the_way_change_nothing(world, every, steps):
    plain = reference(**RECIPES["sgd"])
    for outcome in run_distributed(run_toy, world, toy_plan(**RECIPES["sgd"], eval_every=every)):
        assert outcome == plain
        assert [step for step, _ in outcome.evaluations] == steps
