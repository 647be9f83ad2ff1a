"""Every --sync learns about as well as allreduce, images and text; simulated workers, real servers' parts."""

import functools
import itertools
import random

import pytest
import torch
from toys import RoundRecorder

from orchestrator import rounds
from orchestrator.assembly import build
from orchestrator.build import build_state
from orchestrator.evaluate import evaluate
from orchestrator.group import Group
from orchestrator.handout import Counted, Handout, Unit
from orchestrator.microbatch import Microbatches
from orchestrator.plan import Plan
from orchestrator.resume import settle_arithmetic
from orchestrator.server_part import ServerPart, split
from orchestrator.shards import even_placement
from orchestrator.state import TrainingState
from workloads.registry import WORKLOADS

ALONE = Group(0, 1, torch.device("cpu"))
# Held-out figure, settings, and how much less than that of allreduce it may be.
SHORT = {
    "resnet": ("accuracy", {"epochs": "12"}, 0.02),
    "bert": ("masked_accuracy", {"steps": "300", "hidden_size": "64", "dropout": "0"}, 0.02),
}
SYNCS = {
    "bounded": {"sync": "parameter-server", "staleness": "2"},
    "unbounded": {"sync": "parameter-server", "staleness": "inf"},
    "local-sgd": {"sync": "local-sgd"},
    "diloco": {"sync": "diloco", "local_steps": "12"},
}


def plan_of(workload: str, **given: str) -> Plan:
    entry = WORKLOADS[workload]
    settings = {"loader_processes": "0", **SHORT[workload][1], **given}
    config = settle_arithmetic(build(entry.config_type(), settings), False)
    summary = entry.check_data(config)
    return Plan(workload, config, summary.train_samples, summary.heldout_samples, summary.fingerprint)


def served(plan: Plan, workload, state: TrainingState, workers: int) -> tuple[TrainingState, int]:
    """Trained by workers that push when chance has it, one of them a tenth as often; also the worst staleness."""
    parts = split(plan, state)
    servers = [ServerPart(plan, workload, n, None, 0) for n in range(len(parts))]
    handout = Handout(Counted(servers[0].width), plan.total_steps, plan.config.staleness.steps)
    desk = Microbatches(plan, workload, state, ALONE, parts)
    holding: dict[str, tuple[Unit, list[int], object]] = {}
    chance, worst = random.Random(0), 0
    names = [f"w{n}" for n in range(workers)]
    for _ in itertools.count():
        name = chance.choices(names, [1.0] * (workers - 1) + [0.1])[0]
        if name in holding:
            unit, versions, computed = holding.pop(name)
            for n, server in enumerate(servers):
                push = (unit, versions[n], computed.gradients[n], computed.statistics, computed.samples)
                worst = max(worst, server.push(*push))
            handout.finish(name, unit)
        unit = handout.take(name)
        if unit is not None:
            pulled = [server.pull(-1) for server in servers]
            for n, (_, flat) in enumerate(pulled):
                desk.place(n, flat)
            holding[name] = unit, [version for version, _ in pulled], desk.compute(unit, 0.0, desk.read(unit))
        if handout.complete:
            break
    for n, server in enumerate(servers):
        desk.place(n, server.pull(-1)[1])
    desk.place_buffers(servers[0].buffers())
    return state, worst


def figures(plan: Plan, workers: int = 4) -> dict[str, float]:
    workload = WORKLOADS[plan.workload].build(plan.config)
    state = build_state(plan, workload, torch.device("cpu"))
    if plan.config.sync == "parameter-server":
        state, worst = served(plan, workload, state, workers)
        assert worst >= 4, "nothing was stale"
    else:
        rounds.train(plan, workload, state, ALONE, even_placement(plan.config.shards, 1), RoundRecorder())
    found = evaluate(workload, state.model, state.precision, ALONE, 0)
    print(plan.workload, plan.config.sync, plan.config.staleness, found)
    return found


@functools.cache
def synchronous(workload: str) -> dict[str, float]:
    return figures(plan_of(workload))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workload", SHORT)
@pytest.mark.parametrize("sync", SYNCS)
def test_about_as_well_as_allreduce(workload, sync):
    name, _, within = SHORT[workload]
    assert figures(plan_of(workload, **SYNCS[sync]))[name] > synchronous(workload)[name] - within
