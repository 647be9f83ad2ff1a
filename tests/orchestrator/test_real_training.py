"""Options of the workloads that are made for speed: the same weights for 1 and 2 workers, and others than without."""

import pytest
from distributed import run_distributed
from real import real_plan, run_real

SMALL = {"shards": 4, "batch_size": 64, "steps": 4}
DIGITS = {**SMALL, "image_size": 16, "model": "airbench-small", "augment": "shift"}
OPTIONS = {
    "airbench": ("resnet", {**DIGITS, "optimizer": "nesterov", "eval_every": 0.1}, {**DIGITS, "optimizer": "sgd"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_weights_do_not_depend_on_the_workers(option):
    workload, given, otherwise = OPTIONS[option]
    plan = real_plan(workload, **given)
    both = run_distributed(run_real, 2, plan)  # first, so that the processes of a new pool start together
    (alone,) = run_distributed(run_real, 1, plan)
    assert both == [alone, alone]
    (without,) = run_distributed(run_real, 1, real_plan(workload, **otherwise))
    assert without[0] != alone[0]
