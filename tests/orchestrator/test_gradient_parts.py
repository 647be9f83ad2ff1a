"""Batch normalization against torch's own, and the tree reducer's gradients against autograd's."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
from distributed import run_distributed
from stage import CPU, on_machine
from torch import nn
from toys import Recorder, ToyWorkload, toy_plan, toy_state

from orchestrator import lots, reduce, transport
from orchestrator.batchnorm import RunningStatistics
from orchestrator.group import Group, PeerLostError
from orchestrator.loop import train
from orchestrator.reduce import TreeReducer
from orchestrator.shards import derive_seed, even_placement, placement_from_counts
from orchestrator.state import sha256_of, weights_sha256
from orchestrator.step import ShardedGradients

ALONE = Group(0, 1, torch.device("cpu"))
ULP = 2.0**-23


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.9, 1.0, None])
def test_with_one_shard_statistics_are_those_of_torch(momentum):
    """To 1 ulp a step (of the largest channel), not exactly: torch rounds m * new + (1 - m) * old elsewhere."""
    torch.manual_seed(0)
    batches = [torch.randn(9, 5, 3, 3) * 3 + 1 for _ in range(6)]
    plain, ours = (nn.Sequential(nn.BatchNorm2d(5, momentum=momentum)) for _ in range(2))
    statistics = RunningStatistics(ours)
    for step, batch in enumerate(batches):
        plain(batch)
        statistics.start_step()
        ours(batch)
        statistics.fold(statistics.of_last_forward(len(batch)), len(batch), step + 1)
        assert ours[0].num_batches_tracked.item() == plain[0].num_batches_tracked.item() == step + 1
    for name in ("running_mean", "running_var"):
        a, b = getattr(plain[0], name), getattr(ours[0], name)
        scale = a.abs().max()
        assert (a - b).abs().max() <= len(batches) * ULP * scale
    statistics.close()
    assert ours[0].momentum == momentum


def test_shards_are_weighted_by_their_samples():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.5))
    statistics = RunningStatistics(model)
    parts = torch.tensor([[1.0, 2], [3, 4], [5, 9]]), torch.tensor([[10.0, 0], [20, 8]])
    statistics.start_step()
    total = torch.zeros(statistics.numel)
    for part in parts:
        model(part)
        total += statistics.of_last_forward(len(part))
    statistics.fold(total, 5, 1)
    mean = sum(p.mean(0) * len(p) for p in parts) / 5
    variance = sum(p.var(0) * len(p) for p in parts) / 5
    assert torch.allclose(model[0].running_mean, 0.5 * mean)
    assert torch.allclose(model[0].running_var, 0.5 + 0.5 * variance)


def test_models_without_running_statistics_have_none():
    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        assert RunningStatistics(model).numel == 0


def test_steps_are_counted_not_forward_passes():
    plan = toy_plan(steps=4)
    state = toy_state(plan)
    source = ShardedGradients(plan, ToyWorkload(plan.config), state, ALONE, even_placement(8, 1), 0)
    for step in range(3):
        source.compute(step, False)
        source.committed(step)
        assert state.model.bn.num_batches_tracked.item() == step + 1
    source.close()
    assert state.model.bn.momentum == 0.1
    assert not state.parameters[0]._post_accumulate_grad_hooks


def test_a_step_that_is_not_committed_leaves_no_trace():
    """A lost peer ends a step between compute() and committed(): the recomputed step starts from the old buffers."""
    plan = toy_plan(steps=4)
    state = toy_state(plan)
    before = weights_sha256(state.model)
    source = ShardedGradients(plan, ToyWorkload(plan.config), state, ALONE, even_placement(8, 1), 0)
    source.compute(0, False)
    source.close()
    assert weights_sha256(state.model) == before


def test_a_peer_that_is_lost_before_the_first_step_leaves_no_trace(monkeypatch):
    plan = toy_plan(steps=4)
    found = []
    for lost in (False, True):
        state = toy_state(plan)
        with monkeypatch.context() as patch:
            patch.setattr(reduce, "transport", Mock(side_effect=PeerLostError))
            for _ in range(2 if lost else 0):
                with pytest.raises(PeerLostError):
                    train(plan, ToyWorkload(plan.config), state, Group(0, 2, CPU), even_placement(8, 2), Recorder())
        train(plan, ToyWorkload(plan.config), state, ALONE, even_placement(8, 1), Recorder())
        found.append(weights_sha256(state.model))
    assert found[0] == found[1]


def test_gradients_are_those_of_autograd():
    """Also of tied parameters, of those that only some shards use, and of those that none does."""
    plan = toy_plan(batch_size=64, steps=1, norm=False)
    state, workload = toy_state(plan), ToyWorkload(plan.config)
    state.model.dropout.p = 0.0
    reducer = TreeReducer(state.parameters, 1, ALONE)
    reducer.place(even_placement(8, 1))
    reducer.start_step()
    samples, whole = workload.samples("train"), []
    for shard in range(8):
        reducer.start_shard(shard)
        _, indices = plan.schedule.indices(0, 0, shard)
        whole += indices.tolist()
        reducer.add_extra(torch.ones(1))
        workload.sums(state.model.train(), samples.microbatch(indices, 0)).loss.backward()
        reducer.end_shard()
    reducer.finish()
    assert 3 in whole, "the sample that uses the rare parameters"
    assert reducer.extra.item() == 8
    found = {n: p.grad.clone() for n, p in state.model.named_parameters()}
    reducer.close()
    state.optimizer.zero_grad()
    total = 0.0
    for shard in range(8):
        batch = samples.microbatch(plan.schedule.indices(0, 0, shard)[1], 0)
        total = total + workload.sums(state.model, batch).loss
    total.backward()
    assert not found["never"].any()
    assert found["rare.weight"].any()
    for name, parameter in state.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-5), name


@contextlib.contextmanager
def on(machine: int) -> Iterator[None]:
    """As if this worker were on a machine of that number; buckets are small, and messages smaller."""
    with on_machine(machine), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "ALONE_BYTES", 5_000)
        patch.setattr(reduce, "BUCKET_BYTES", 3_000)
        patch.setattr(lots, "PIECE_FLOATS", 1_000)
        patch.setattr(lots, "LOT_FLOATS", 3_000)
        patch.setattr(transport, "WINDOW", 3)
        yield


def known_sums(group: Group, counts: tuple[int, ...], steps: int = 2) -> list[str]:
    """Hashes of sums of gradients that differ in magnitude, so that another order of adding gives other bits."""
    parameters = [
        nn.Parameter(torch.zeros(shape)) for shape in [(7,), (3, 5), (40, 30), (2, 3, 4), (30, 1000), (500,), (50, 40)]
    ]
    with torch.no_grad():
        for i in (3, 6):
            parameters[i].data = parameters[i].data.transpose(0, 1)  # a layout of its own
    reducer = TreeReducer(parameters, 11, group)
    placement = placement_from_counts(counts)
    reducer.place(placement)
    found = []
    for step in range(steps):
        reducer.start_step()
        for shard in placement.range_of(group.rank):
            reducer.start_shard(shard)
            torch.manual_seed(derive_seed(step, shard))
            reducer.add_extra(torch.randn(11) * 10.0 ** (shard % 5))
            if shard % 3 != 2:  # every third shard is empty
                loss = sum((p * torch.randn(p.shape) * 10.0 ** (shard % 7)).sum() for p in parameters[shard % 2 :])
                loss.backward()
            reducer.end_shard()
        reducer.finish()
        assert all(p.grad.stride() == p.stride() for p in parameters)
        found.append(sha256_of((str(i), t) for i, t in enumerate([*(p.grad for p in parameters), reducer.extra])))
    reducer.close()
    return found


def sums_on(group: Group, cases: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[list[str]]:
    found = []
    for counts, machines in cases:
        with on(machines[group.rank]):
            found.append(known_sums(group, counts))
    return found


COUNTS = {
    2: [(1, 1), (2, 2), (1, 3), (3, 5), (8, 8), (5, 11), (1, 15)],
    3: [(1, 2, 1), (2, 3, 3), (4, 4, 8), (1, 14, 1), (7, 2, 7), (5, 5, 6)],
    4: [(1, 1, 1, 1), (2, 2, 2, 2), (4, 4, 4, 4), (3, 3, 5, 5), (1, 2, 4, 9)],
    5: [(1, 2, 1, 2, 2), (2, 6, 6, 1, 1), (3, 3, 3, 3, 4)],
}
MACHINES = {
    2: [(1, 1), (1, 2)],
    3: [(1, 1, 1), (1, 2, 3), (1, 1, 2), (1, 2, 1)],
    4: [(1, 1, 1, 1), (1, 2, 3, 4), (1, 1, 2, 2), (1, 2, 2, 2)],
    5: [(1, 1, 1, 1, 1), (1, 2, 3, 4, 5), (1, 1, 2, 2, 2), (1, 1, 1, 1, 2), (1, 2, 2, 3, 3)],
}


@pytest.mark.parametrize("world", COUNTS)
def test_sums_have_the_same_bits_on_every_placement(world):
    """Whoever shares a machine with whom; two steps, for stale views show in the second."""
    cases = list(itertools.product(COUNTS[world], MACHINES[world]))
    alone = {shards: known_sums(ALONE, (shards,)) for shards in {sum(counts) for counts in COUNTS[world]}}
    for found in run_distributed(sums_on, world, cases):
        for case, sums in zip(cases, found, strict=True):
            assert sums == alone[sum(case[0])], case


def sums_by_collectives(group: Group, placements: list[tuple[int, ...]]) -> list[list[str]]:
    """As on GPUs, with gloo in place of NCCL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "transport", transport.of_gpus)
        return [known_sums(group, counts) for counts in placements]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_collectives_have_the_same_bits(world):
    for found in run_distributed(sums_by_collectives, world, COUNTS[world]):
        for counts, sums in zip(COUNTS[world], found, strict=True):
            assert sums == known_sums(ALONE, (sum(counts),)), counts


def test_gradients_that_share_a_bucket_begin_where_memory_is_aligned():
    """GPUs add a norm in another order where it is not, and one worker's gradients always are."""
    shapes = [(7,), (3, 5), (10,), (16,), (33,)]
    buckets = reduce._pack([nn.Parameter(torch.zeros(shape)) for shape in shapes], 2**20)
    (bucket,) = buckets
    assert all(offset % lots.LINE_FLOATS == 0 for offset in bucket.offsets)
    ends = [start + math.prod(shapes[i]) for i, start in zip(bucket.members, bucket.offsets, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*bucket.offsets[1:], bucket.numel], strict=True))


def join_sums(group: Group, apart: bool) -> list[torch.Tensor]:
    """Several buckets: more than BUCKET_BYTES of parameters."""
    parameters = [nn.Parameter(torch.zeros(1_500_000)) for _ in range(3)]
    reducer = TreeReducer(parameters, 2, group)
    placement = even_placement(4, group.world)
    with on_machine(group.rank if apart else 0):
        reducer.place(placement)
    reducer.start_step()
    for shard in placement.range_of(group.rank):
        reducer.start_shard(shard)
        reducer.add_extra(torch.tensor([1.0, shard]))
        sum((p * float(10**shard + i)).sum() for i, p in enumerate(parameters)).backward()
        reducer.end_shard()
    reducer.finish()
    reducer.close()
    assert all(p.grad.eq(p.grad[0]).all() for p in parameters)
    return [torch.stack([p.grad[0] for p in parameters]), reducer.extra.clone()]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("apart", [False, True])
def test_parameters_of_several_buckets(world, apart):
    for sums, extra in run_distributed(join_sums, world, apart):
        assert sums.tolist() == [1111.0, 1115.0, 1119.0]
        assert extra.tolist() == [4.0, 6.0]


def reduce_and_update(group: Group, own: bool) -> list[int]:
    """Whether p.grad is memory of this process alone."""
    parameters = [nn.Parameter(torch.zeros(1000))]
    reducer = TreeReducer(parameters, 1, group)
    reducer.place(even_placement(4, group.world))
    reducer.start_step()
    for shard in even_placement(4, group.world).range_of(group.rank):
        reducer.start_shard(shard)
        reducer.add_extra(torch.ones(1))
        parameters[0].sum().backward()
        reducer.end_shard()
    reducer.finish(own)
    group.sum(torch.zeros(1))
    if group.rank == 0:
        parameters[0].grad.zero_()
    group.sum(torch.zeros(1))
    reducer.close()
    return [int(parameters[0].grad.sum()), os.getpid()]


@pytest.mark.parametrize("own", [True, False])
def test_gradients_are_the_worker_s_own_where_it_asks_for_that(own):
    """fp16's scaler writes to them; what is shared is not copied."""
    found = run_distributed(reduce_and_update, 2, own)
    assert [total for total, _ in found] == ([0, 4000] if own else [0, 0])
    assert len({process for _, process in found}) == 2
