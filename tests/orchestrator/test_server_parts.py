"""Parameter servers without Ray: with staleness 0 the bits of allreduce, else every microbatch once."""

import itertools
import random

import numpy as np
import pytest
import torch
from toys import Recorder, ToyWorkload, run_toy, toy_plan

from orchestrator.build import build_state
from orchestrator.errors import UserError
from orchestrator.group import Group
from orchestrator.handout import Counted, Handout, Unit
from orchestrator.loop import train
from orchestrator.microbatch import Microbatches
from orchestrator.plan import Plan
from orchestrator.server_part import ServerPart, TreeSum, split
from orchestrator.shards import even_placement
from orchestrator.state import weights_sha256

ALONE = Group(0, 1, torch.device("cpu"))
SERVED = {"sync": "parameter-server", "servers": 2}


class Service:
    """Servers and one worker's calculations in this process."""

    def __init__(self, plan: Plan, loaded=None, step: int = 0) -> None:
        workload = ToyWorkload(plan.config)
        self.plan, self.state = plan, build_state(plan, workload, torch.device("cpu"))
        parts = split(plan, self.state)
        self.servers = [ServerPart(plan, workload, n, loaded, step) for n in range(len(parts))]
        self.worker = Microbatches(plan, workload, self.state, ALONE, parts)
        self.versions = [-1] * len(parts)
        self.random = random.Random(1)

    def pull(self) -> None:
        for n, server in enumerate(self.servers):
            self.versions[n], flat = server.pull(self.versions[n])
            if flat is not None:
                self.worker.place(n, flat)

    def push(self, unit: Unit, computed, servers=None) -> list[int]:
        chosen = range(len(self.servers)) if servers is None else servers
        return [
            self.servers[n].push(unit, self.versions[n], computed.gradients[n], computed.statistics, computed.samples)
            for n in chosen
        ]

    def compute(self, unit: Unit):
        return self.worker.compute(unit, 0.0, self.worker.read(unit))

    def step(self, step: int) -> None:
        """One synchronous step, microbatches in any order, some of them twice."""
        self.pull()
        order = [Unit(step, shard) for shard in range(self.servers[0].width(step))]
        self.random.shuffle(order)
        count = 0.0
        for unit in order:
            computed = self.compute(unit)
            count += computed.count
            for _ in range(self.random.randint(1, 2)):
                self.push(unit, computed)
        norms = [server.sum_up(step, count) for server in self.servers]
        for server in self.servers:
            server.apply(step, np.concatenate(norms))

    def sha256(self) -> str:
        self.pull()
        self.worker.place_buffers(self.servers[0].buffers())
        return weights_sha256(self.state.model)

    def told_sha256(self) -> str:
        return self.servers[0].weights_sha256([server.snapshot() for server in self.servers])

    def snapshot(self) -> dict[str, torch.Tensor]:
        parts = [server.snapshot() for server in self.servers]
        return {name: torch.tensor(array) for part in parts for name, array in part.items()}


@pytest.mark.parametrize("shards", [1, 2, 8, 16])
def test_the_tree_s_sum_in_any_order(shards):
    vectors = np.random.default_rng(0).normal(size=(shards, 5)).astype(np.float32) * 1e4
    expected = vectors.copy()
    while len(expected) > 1:
        expected = expected[::2] + expected[1::2]
    for seed in range(5):
        tree, order = TreeSum(shards), list(range(shards))
        random.Random(seed).shuffle(order)
        for shard in order:
            tree.add(shard, vectors[shard])
        assert tree.total([]).tobytes() == expected[0].tobytes()


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "sgd", "weight_decay": 0.01, "servers": 2},
        {"optimizer": "adamw", "clip_norm": 0.5, "decay": "matrices", "weight_decay": 0.1, "servers": 3},
        {"optimizer": "adam", "precision": "bf16", "servers": 1},
        {"optimizer": "sgd", "clip_norm": 1e-3, "servers": 5, "items": "none"},
    ],
)
def test_staleness_0_has_the_bits_of_allreduce(given):
    """And a checkpoint in the middle goes on in the same bits, with another number of servers."""
    common = {name: value for name, value in given.items() if name != "servers"}
    expected = run_toy(ALONE, toy_plan(**common)).sha256
    plan = toy_plan(**SERVED | given)
    service = Service(plan)
    for step in range(plan.total_steps // 2):
        service.step(step)
    others = toy_plan(**SERVED | given).with_config(servers=given["servers"] % 3 + 1)
    again = Service(others, service.snapshot(), plan.total_steps // 2)
    for one in (service, again):
        for step in range(plan.total_steps // 2, plan.total_steps):
            one.step(step)
        assert one.sha256() == one.told_sha256() == expected


def test_parameters_that_are_not_trained_are_in_the_checkpoint(monkeypatch):
    """As the whitening of airbench."""
    plain = ToyWorkload.build_model

    def frozen(self):
        model = plain(self)
        model.conv.requires_grad_(False)
        return model

    monkeypatch.setattr(ToyWorkload, "build_model", frozen)
    plan = toy_plan(**SERVED)
    service = Service(plan)
    service.step(0)
    again = Service(plan, service.snapshot(), 1)
    assert again.sha256() == service.sha256() == service.told_sha256()


def test_parameters_keep_their_memory_layout(monkeypatch):
    """Fused optimizers walk memory: parameters, gradients and optimizer state must lie in the same order."""
    plain = ToyWorkload.build_model
    monkeypatch.setattr(ToyWorkload, "build_model", lambda self: plain(self).to(memory_format=torch.channels_last))
    plan = toy_plan(**SERVED, epochs=1)
    state = build_state(plan, ToyWorkload(plan.config), torch.device("cpu"))
    assert any(not p.is_contiguous() for p in state.parameters)
    train(plan, ToyWorkload(plan.config), state, ALONE, even_placement(8, 1), Recorder())
    service = Service(plan)
    for step in range(plan.total_steps):
        service.step(step)
    assert service.sha256() == weights_sha256(state.model)
    assert all(tensor.is_contiguous() for tensor in service.snapshot().values())


def test_a_stale_gradient_is_counted_once_and_its_staleness_is_known():
    plan = toy_plan(**SERVED, staleness="2")
    service = Service(plan)
    service.pull()
    first, second = Unit(0, 0), Unit(0, 1)
    ones = {unit: service.compute(unit) for unit in (first, second)}
    assert service.push(first, ones[first]) == [0, 0]
    before = service.sha256()
    service.versions = [0, 0]
    assert service.push(second, ones[second], servers=[0]) == [1]
    assert service.push(first, ones[first]) == [2, 1]
    between = service.servers[0].snapshot()
    assert between["applied.0"].tolist() == [0, 0, 0, 0, 1]
    assert service.servers[1].snapshot()["applied.1"].tolist() == [0, 0, 0]
    assert before != service.sha256()


def test_a_checkpoint_in_the_middle_of_steps_knows_what_each_server_has():
    plan = toy_plan(**SERVED, staleness="inf")
    service = Service(plan)
    service.pull()
    service.push(Unit(0, 1), service.compute(Unit(0, 1)))
    service.push(Unit(0, 2), service.compute(Unit(0, 2)), servers=[1])
    kept = service.snapshot()
    again = Service(plan, kept, 0)
    assert Unit(0, 2) in again.servers[1].applied
    assert Unit(0, 2) not in again.servers[0].applied
    assert again.sha256() == service.sha256()
    with pytest.raises(UserError, match="resume with --servers 2"):
        Service(plan.with_config(servers=3), kept, 0)


def test_what_batch_normalization_counts_goes_on_after_a_checkpoint():
    plan = toy_plan(**SERVED, staleness="1")
    service = Service(plan)
    for shard in range(3):
        service.pull()
        service.push(Unit(0, shard), service.compute(Unit(0, shard)))
    counted = "model.bn.num_batches_tracked"
    kept = service.snapshot()
    assert kept[counted] == 3
    again = Service(plan, kept, 0)
    again.pull()
    again.push(Unit(0, 3), again.compute(Unit(0, 3)))
    assert again.snapshot()[counted] == 4


def test_asynchronous_updates_go_as_far_as_a_step():
    """Without momentum, noise or batch normalization's dependence: the sum of a step's updates is about the step."""
    common = {"norm": False, "ragged": False, "momentum": 0.0, "lr": 1e-4, "steps": 1}
    start = build_state(toy_plan(**common), ToyWorkload(toy_plan(**common).config), torch.device("cpu")).snapshot()
    expected = run_toy(ALONE, toy_plan(**common)).snapshot
    plan = toy_plan(**SERVED, **common, staleness="inf")
    service = Service(plan)
    for shard in range(8):
        service.pull()
        service.push(Unit(0, shard), service.compute(Unit(0, shard)))
    service.pull()
    for name, parameter in service.state.model.named_parameters():
        there, here = expected[f"model.{name}"] - start[f"model.{name}"], parameter - start[f"model.{name}"]
        # Each microbatch's own mean weighs the same here; there, each of its items does.
        assert torch.nn.functional.cosine_similarity(there.flatten(), here.flatten(), dim=0) > 0.95
        assert 0.7 < here.norm() / there.norm() < 1.4


def test_workers_that_come_and_go_leave_each_server_with_every_microbatch_once():
    plan = toy_plan(**SERVED, staleness="1", lr=1e-3)
    service = Service(plan)
    handout = Handout(Counted(service.servers[0].width), plan.total_steps, 1)
    chance = random.Random(3)
    for turn in itertools.count():
        service.pull()
        worker = f"w{turn}"
        unit = handout.take(worker)
        if unit is None:
            break
        reached = chance.choice([[], [0], [1], [0, 1], [0, 1]])
        service.push(unit, service.compute(unit), reached)
        if reached == [0, 1]:
            assert handout.finish(worker, unit)
        else:
            handout.take_back(worker)
    assert handout.complete
    samples = sum(service.servers[0].width(step) for step in range(plan.total_steps))
    assert [server.version for server in service.servers] == [samples, samples]
