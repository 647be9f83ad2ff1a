"""The workloads themselves on spawned processes, as a worker trains them but without Ray."""

import os
from typing import Any

from toys import Recorder

from orchestrator.assembly import build
from orchestrator.build import build_state, prepare_torch
from orchestrator.compiled import compile_for
from orchestrator.evaluate import evaluate
from orchestrator.group import Group
from orchestrator.loop import train
from orchestrator.plan import Plan
from orchestrator.resume import settle_arithmetic
from orchestrator.shards import even_placement
from orchestrator.state import weights_sha256
from workloads.registry import WORKLOADS


def real_plan(name: str, **given: object) -> Plan:
    """The plan of a run with these settings, on one thread."""
    entry = WORKLOADS[name]
    config = build(entry.config_type(), {"threads": 1, "precision": "fp32", "loader_processes": 0, **given})
    config = settle_arithmetic(config, gpu=False)
    data = entry.check_data(config)
    return Plan(name, config, data.train_samples, data.heldout_samples, data.fingerprint, data.blocks)


def run_real(group: Group, plan: Plan, cache: str = "") -> tuple[str, list[float], dict[str, float], list[Any]]:
    """(weights, losses, held-out metrics, evaluations on the way) of a whole run; `cache`: of what is compiled."""
    if plan.config.compile:
        os.environ["ORCHESTRATOR_CACHE"] = cache
    prepare_torch(1, same_bits=True)
    workload = WORKLOADS[plan.workload].build(plan.config)
    state, recorder = build_state(plan, workload, group.device), Recorder()
    compile_for(plan, workload, state, group.device, "here", lambda *_: None)
    train(plan, workload, state, group, even_placement(plan.config.shards, group.world), recorder)
    metrics = evaluate(workload, state.model, state.precision, group, 0)
    return weights_sha256(state.model), recorder.losses, metrics, recorder.evaluations
