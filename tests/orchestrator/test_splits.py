"""Models in parts, on spawned processes: the losses and weights of one worker."""

from typing import Any

import pytest
from distributed import run_distributed
from real import real_plan
from toys import Recorder

from orchestrator.build import build_state, prepare_torch
from orchestrator.evaluate import evaluate
from orchestrator.group import Group
from orchestrator.layout import layout_of, units_of
from orchestrator.loop import train
from orchestrator.plan import Plan
from orchestrator.shards import even_placement
from orchestrator.split_build import build_part
from orchestrator.splits import SplitState
from orchestrator.state import memory_bytes, sha256_of
from workloads.registry import WORKLOADS

SMALL = {
    "bert": {"batch_size": 16, "shards": 4, "vocab_size": 512, "optimizer": "adamw"},
    "resnet": {"batch_size": 32, "shards": 4},
}


def run_part(group: Group, plan: Plan) -> dict[str, Any]:
    prepare_torch(1, same_bits=True)
    workload, config = WORKLOADS[plan.workload].build(plan.config), plan.config
    recorder = Recorder()
    if group.world == 1:
        state = build_state(plan, workload, group.device)
        placement = even_placement(config.shards, 1)
    else:
        state = build_part(plan, workload, group)
        layout = layout_of(config.parallel, group.world)
        placement = even_placement(units_of(config.parallel, layout, config.shards)[0], layout.groups)
    train(plan, workload, state, group, placement, recorder)
    using, among = state.evaluation(workload, group)
    metrics = evaluate(using, state.model, state.precision, among, 0)
    whole = dict(state.whole_weights() if isinstance(state, SplitState) else state.model.state_dict())
    return {
        "losses": recorder.losses,
        "metrics": metrics,
        "sha256": sha256_of(whole.items()),
        "weights": {name: t.clone() for name, t in whole.items()} if group.rank == 0 else {},
        "snapshot": state.tensors(),
        "bytes": memory_bytes(state)["state"],
    }


ONE: dict[str, dict[str, Any]] = {}


def alone(name: str, **given: object) -> dict[str, Any]:
    key = f"{name}{sorted(given.items())}"
    if key not in ONE:
        (ONE[key],) = run_distributed(run_part, 1, real_plan(name, **SMALL[name], **given))
    return ONE[key]


def distance(outcome: dict[str, Any], other: dict[str, Any]) -> float:
    a, b = outcome["weights"], other["weights"]
    assert list(a) == list(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("name", "parallel", "world", "same"),
    [
        ("bert", "tensor=2", 2, False),
        ("bert", "fsdp", 2, True),
        ("bert", "hsdp=2", 4, True),
        ("resnet", "fsdp", 2, False),
        ("resnet", "pipeline=2", 2, True),
        ("bert", "pipeline=2", 2, True),
    ],
)
def test_parts_train_as_one_worker_does(name, parallel, world, same):
    one = alone(name, steps=5)
    plan = real_plan(name, **SMALL[name], steps=5, parallel=parallel, workers=world)
    workers = run_distributed(run_part, world, plan)
    assert len({worker["sha256"] for worker in workers}) == 1
    assert (workers[0]["sha256"] == one["sha256"]) == same
    assert distance(workers[0], one) < 1e-5
