"""Sums over slices, with gloo in the place of XLA's group: the same bits as one worker's, whatever the slices."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed

from orchestrator.group import Group
from orchestrator.shards import Block, placement_from_counts, push_block
from orchestrator.slice_sums import SliceSums
from orchestrator.tree import Bucket

NUMELS = (48, 25)  # the second has no equal chunks


def gradient(shard: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * shard + numel))


def blocks_of(shards: range, numel: int) -> list[torch.Tensor]:
    """The sums of a range's aligned blocks."""
    stack, blocks = list[torch.Tensor](), list[Block]()
    for shard in shards:
        stack.append(gradient(shard, numel))
        for _ in range(push_block(blocks, Block(shard, 1))):
            right = stack.pop()
            stack[-1] = stack[-1] + right
    return stack


def summed(group: Group, size: int, counts: list[int]) -> list[torch.Tensor]:
    placement = placement_from_counts(counts)
    if size > 1:
        slices = [list(range(first, first + size)) for first in range(0, group.world, size)]
        group.inside = [dist.new_group(ranks) for ranks in slices][group.rank // size]
    buckets = [Bucket([], [], numel) for numel in NUMELS]
    sums = SliceSums(group, placement, buckets)
    for _ in range(2):  # a second step, in the memory of the first
        sums.start()
        own = [blocks_of(placement.range_of(group.rank), numel) for numel in NUMELS]
        for place in range(len(own[0])):
            for number, bucket in enumerate(buckets):
                bucket.blocks[place, : bucket.numel].copy_(own[number][place])
                sums.launch(number, place)
        sums.finish()
    sums.close()
    return [bucket.total[: bucket.numel] for bucket in buckets]


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        (1, [3, 5]),
        (2, [3, 5]),
        (2, [2, 2, 2, 2]),
        (2, [1, 3, 2, 2]),
        (2, [5, 1, 1, 1]),
        (1, [2, 3, 3]),
        (4, [1, 4, 2, 1]),
    ],
)
def test_the_bits_are_those_of_one_worker(size, counts):
    alone = [blocks_of(range(sum(counts)), numel)[0] for numel in NUMELS]
    for totals in run_distributed(summed, len(counts), size, counts):
        assert all(map(torch.equal, totals, alone))
