"""What microbatches say of their step: its record, and that every sample was used once."""

import pytest
from toys import toy_plan

from orchestrator.errors import TrainingError
from orchestrator.handout import Unit
from orchestrator.served import Done
from orchestrator.stepbook import StepBook


def book(missing: int = 0) -> tuple[StepBook, int, int]:
    """With all microbatches of the first step; its shards, and its samples."""
    plan = toy_plan(sync="parameter-server")
    made, samples = StepBook(plan), 0
    for shard in range(plan.schedule.microbatches_in_step(0)):
        _, start, stop = plan.schedule.places(0, shard)
        count = stop - start - (missing if shard == 0 else 0)
        samples += count
        made.add(Done(Unit(0, shard), 2.0 * count, float(count), count, shard, shard % 2, 1.0, 2.0, 1.0))
    return made, plan.schedule.microbatches_in_step(0), samples


def test_the_record_of_a_step():
    made, shards, samples = book()
    assert made.count(0) == samples
    record = made.close(0, 0.5)
    assert (record["step"], record["samples"], record["loss"]) == (1, samples, 2.0)
    assert (record["data_share"], record["compute_share"], record["reduce_share"]) == (0.25, 0.5, 0.25)
    assert (record["samples_per_s"], record["step_s"]) == (samples / 0.5, 0.5)
    assert (record["staleness_mean"], record["staleness_max"]) == (round(shards // 2 / shards, 3), 1)
    assert made.staleness() == {"mean": round(shards // 2 / shards, 3), "max": 1}
    again, _, _ = book()
    assert again.close(0, 0.1)["ledger"] == record["ledger"]


def test_a_step_that_lacks_a_sample_is_an_error():
    made, _, samples = book(missing=1)
    with pytest.raises(TrainingError, match=f"step 0: {samples} samples were computed where {samples + 1} belong"):
        made.close(0, 0.5)
