"""How blocks of gradients get from worker to worker, and where their sums are left."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.group import Group
from orchestrator.shards import Block, Placement, push_block
from orchestrator.sharedmemory import share


@dataclass
class Bucket:
    """A stretch of parameters that travels in one message.

    Attributes:
        members, offsets: the parameters in it, and where each begins.
        numel: a multiple of the number of workers.
        missing: parameters whose gradients are not yet in `blocks`.
        blocks: fp32 [own blocks, numel]; each block's gradients of these parameters laid end to end.
        total: fp32 [numel], the sum over all blocks.
    """

    members: list[int]
    offsets: list[int]
    numel: int
    missing: int = 0
    blocks: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    received: Tensor = field(default_factory=lambda: torch.empty(0))
    work: dist.Work | None = None


class Transport(Protocol):
    """Sums the blocks of all workers in tree order, bucket by bucket.

    Attributes:
        common: whether `total` is one memory for all workers, so that nobody may write to it.
    """

    common: bool

    def launch(self, bucket: Bucket) -> None:
        """The blocks of `bucket` are complete here; every worker launches the buckets in the same order."""
        ...

    def finish(self) -> None:
        """Wait until all totals are complete; raises PeerLostError if a worker is lost."""
        ...


def fold(order: list[Block], rows: list[Tensor], total: Tensor) -> None:
    """Leave the sum of `rows`, one for each block of `order`, in `total`; rows are overwritten."""
    blocks: list[Block] = []
    stack: list[Tensor] = []
    for place, (block, row) in enumerate(zip(order, rows, strict=True)):
        stack.append(row)
        for merge in range(push_block(blocks, block), 0, -1):
            right, left = stack.pop(), stack.pop()
            last = place == len(rows) - 1 and merge == 1
            stack.append(torch.add(left, right, out=total if last else left))
    if len(rows) == 1:
        total.copy_(rows[0])


class SharedSums:
    """On one machine: blocks lie in memory that all see, and each worker folds its chunk of all of them there."""

    common = True

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket], memory: list[Tensor]) -> None:
        self._group = group
        self._order, counts = _order(placement, group.world)
        self._buckets = buckets
        self._rows: list[list[Tensor]] = []
        starts = [0] * group.world
        for bucket in buckets:
            n = bucket.numel
            mine = slice(group.rank * (n // group.world), (group.rank + 1) * (n // group.world))
            rows: list[Tensor] = []
            for rank, count in enumerate(counts):
                blocks = memory[rank][starts[rank] : starts[rank] + count * n].view(count, n)
                starts[rank] += count * n
                rows += [row[mine] for row in blocks]
                if rank == group.rank:
                    bucket.blocks = blocks
            bucket.total = memory[0][starts[0] : starts[0] + n]
            starts[0] += n
            self._rows.append([*rows, bucket.total[mine]])

    @staticmethod
    def floats(placement: Placement, world: int, buckets: list[Bucket]) -> list[int]:
        """How much memory each rank has to give."""
        numel = sum(bucket.numel for bucket in buckets)
        return [(len(placement.blocks_of(rank)) + (rank == 0)) * numel for rank in range(world)]

    def launch(self, bucket: Bucket) -> None:
        if bucket is self._buckets[-1]:  # nothing is on its way: one word that all is there will do
            bucket.work = self._group.start_barrier()

    def finish(self) -> None:
        _wait(self._group, self._buckets[-1])
        for rows in self._rows:
            fold(self._order, rows[:-1], rows[-1])
        self._group.wait(self._group.start_barrier())


class HalvesSum:
    """Two workers, one half of the tree each: a plain all-reduce has the same bits, for a + b = b + a."""

    common = False

    def __init__(self, group: Group, buckets: list[Bucket]) -> None:
        self._group, self._buckets = group, buckets
        for bucket in buckets:
            bucket.total = torch.zeros(bucket.numel, device=group.device)
            bucket.blocks = bucket.total.view(1, -1)

    def launch(self, bucket: Bucket) -> None:
        bucket.work = self._group.start_sum(bucket.total)

    def finish(self) -> None:
        for bucket in self._buckets:
            _wait(self._group, bucket)


class Exchange:
    """Each worker receives its chunk of every block (all-to-all), folds the chunks, and the sums are gathered."""

    common = False

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket]) -> None:
        self._group, self._buckets = group, buckets
        self._order, self._counts = _order(placement, group.world)
        for bucket in buckets:
            chunk = bucket.numel // group.world
            bucket.blocks = torch.zeros(self._counts[group.rank], bucket.numel, device=group.device)
            bucket.received = torch.empty(len(self._order), chunk, device=group.device)
            bucket.total = torch.empty(bucket.numel, device=group.device)

    def launch(self, bucket: Bucket) -> None:
        world, chunk = self._group.world, bucket.received.shape[1]
        outgoing = bucket.blocks.view(-1, world, chunk).transpose(0, 1).contiguous().view(-1)
        bucket.work = self._group.start_exchange(
            bucket.received.view(-1),
            outgoing,
            [count * chunk for count in self._counts],
            [self._counts[self._group.rank] * chunk] * world,
        )

    def finish(self) -> None:
        # Two passes: a collective issued from within the first one's completion hangs on gloo.
        for bucket in self._buckets:
            _wait(self._group, bucket)
            fold(self._order, list(bucket.received), bucket.received[0])
            bucket.work = self._group.start_gather(bucket.total, bucket.received[0])
        for bucket in self._buckets:
            _wait(self._group, bucket)


def transport(group: Group, placement: Placement, buckets: list[Bucket]) -> Transport:
    """The quickest that this group can use; gives the buckets their memory. Every worker calls it."""
    if group.device.type == "cpu":
        memory = share(group, SharedSums.floats(placement, group.world, buckets))
        if memory is not None:
            return SharedSums(group, placement, buckets, memory)
    if _order(placement, group.world)[1] == [1, 1]:
        return HalvesSum(group, buckets)
    return Exchange(group, placement, buckets)


def _order(placement: Placement, world: int) -> tuple[list[Block], list[int]]:
    """The blocks of all workers in the order of their shards, and how many each worker has."""
    everyone = [placement.blocks_of(rank) for rank in range(world)]
    return [block for blocks in everyone for block in blocks], [len(blocks) for blocks in everyone]


def _wait(group: Group, bucket: Bucket) -> None:
    assert bucket.work is not None
    group.wait(bucket.work)
    bucket.work = None
