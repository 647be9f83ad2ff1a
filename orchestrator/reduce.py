"""Gradients summed over shards by one fixed binary tree, whoever computed which shard.

On a worker each parameter has a pairwise stack: a shard's gradient is pushed as autograd delivers it, and while
the two topmost blocks are siblings of the tree they are added, so few gradients are alive: log2(shards) + 1 for an
aligned range, at most twice that for any.
A contiguous range of shards ends as a few aligned blocks. Between workers the blocks travel in buckets, launched
as soon as the backward pass of the last shard has filled them: each worker receives its chunk of every block
(all-to-all), folds the chunks in tree order, and the sums are gathered. With two workers that hold one half each,
a plain all-reduce has the same bits, for a + b = b + a.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.group import Group
from orchestrator.shards import Block, Placement, push_block

BUCKET_BYTES = 8 * 2**20


@dataclass
class _Bucket:
    """A stretch of parameters that travels in one message.

    `blocks` is fp32 [own blocks, world, chunk]: each block's gradients of these parameters laid end to end.
    """

    members: list[int]
    offsets: list[int]
    numel: int
    missing: int = 0
    blocks: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    views: list[list[Tensor]] = field(default_factory=list)
    received: Tensor = field(default_factory=lambda: torch.empty(0))
    work: dist.Work | None = None


class TreeReducer:
    """Sums gradients, and one extra vector a shard, over all shards of a step in tree order.

    Use: `start_shard(v)`, backward, for every own shard in ascending order, then `finish()`; `p.grad` then holds
    the sum over all shards, and `extra` that of the extra vectors.
    """

    def __init__(self, parameters: list[nn.Parameter], extra_numel: int, group: Group) -> None:
        self._group = group
        device = group.device
        # The extra vector rides as one more parameter, in the bucket that is ready first.
        self._extra_slot = nn.Parameter(torch.zeros(extra_numel, device=device), requires_grad=False)
        self._slots = [*parameters, self._extra_slot]
        self._stacks: list[list[Tensor]] = [[] for _ in self._slots]
        self._pushed = [0] * len(self._slots)
        self._buckets = _pack(self._slots, group.world)
        self._home = {i: (b, k) for b, bucket in enumerate(self._buckets) for k, i in enumerate(bucket.members)}
        self._launched = 0
        self._shards_done = 0
        self._merges = 0
        self._last = False
        self._range = range(0)
        self._blocks: list[Block] = []
        self.extra = torch.zeros(extra_numel, device=device)
        self._handles = [p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in enumerate(parameters)]

    def close(self) -> None:
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()

    def place(self, placement: Placement) -> None:
        """Take over a placement; between two steps only."""
        rank, world = self._group.rank, self._group.world
        self._range = placement.range_of(rank)
        self._own = placement.blocks_of(rank)
        everyone = [placement.blocks_of(r) for r in range(world)]
        self._counts = [len(blocks) for blocks in everyone]
        self._order = [block for blocks in everyone for block in blocks]
        # Siblings of equal halves: the sum of two has the same bits in either order.
        self._plain = world == 2 and self._counts == [1, 1]
        for bucket in self._buckets:
            if world > 1:
                chunk = bucket.numel // world
                device = self._group.device
                bucket.blocks = torch.zeros(len(self._own), world, chunk, device=device)
                bucket.received = torch.empty(0 if self._plain else len(self._order), chunk, device=device)
                bucket.total = bucket.blocks[0].view(-1) if self._plain else torch.empty(bucket.numel, device=device)
                rows = bucket.blocks.view(len(self._own), bucket.numel)
                bucket.views = [
                    [
                        _view(row, offset, self._slots[i])
                        for i, offset in zip(bucket.members, bucket.offsets, strict=True)
                    ]
                    for row in rows
                ]

    def start_step(self) -> None:
        """Forget the last step's gradients (a stale .grad view would silently break equality)."""
        for p in self._slots:
            p.grad = None
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)
        self._launched = 0
        self._shards_done = 0
        self._pushed = [0] * len(self._slots)
        self._blocks = []

    def start_shard(self, shard: int) -> None:
        """The next backward pass is that of `shard`."""
        assert shard == self._range.start + self._shards_done
        self._merges = push_block(self._blocks, Block(shard, 1))
        self._last = shard == self._range.stop - 1

    def add_extra(self, vector: Tensor) -> None:
        """The started shard's extra vector, [extra_numel]."""
        self._push(len(self._slots) - 1, vector)

    def end_shard(self) -> None:
        """After the backward pass: parameters that the shard did not use get a zero gradient."""
        self._shards_done += 1
        for i, pushed in enumerate(self._pushed):
            if pushed < self._shards_done:
                self._push(i, torch.zeros_like(self._slots[i]))

    def finish(self) -> None:
        """Wait for the other workers; p.grad and `extra` hold the sums. Raises PeerLostError if one is lost."""
        if self._group.world == 1:
            for slot, stack in zip(self._slots, self._stacks, strict=True):
                slot.grad = stack.pop()
        elif self._plain:
            for bucket in self._buckets:
                self._wait(bucket)
        else:
            self._fold_and_gather()
        if self._group.world > 1:
            for bucket in self._buckets:
                for i, offset in zip(bucket.members, bucket.offsets, strict=True):
                    self._slots[i].grad = _view(bucket.total, offset, self._slots[i])
        assert self._extra_slot.grad is not None
        self.extra = self._extra_slot.grad

    def _hook(self, i: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def take(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            assert gradient is not None
            self._push(i, gradient)

        return take

    def _push(self, i: int, gradient: Tensor) -> None:
        stack = self._stacks[i]
        stack.append(gradient)
        self._pushed[i] += 1
        into_bucket = self._last and self._group.world > 1
        for merge in range(self._merges, 0, -1):
            right = stack.pop()
            if merge == 1 and into_bucket:
                left = stack.pop()
                bucket, k = self._home[i]
                place = self._buckets[bucket].views[len(stack)][k]
                stack.append(torch.add(left, right, out=place))
            else:
                stack[-1].add_(right)
        if into_bucket:
            self._deliver(i)

    def _deliver(self, i: int) -> None:
        """Put what is not yet in the bucket there, and launch every bucket whose turn it is."""
        b, k = self._home[i]
        bucket, stack = self._buckets[b], self._stacks[i]
        for row, block in zip(bucket.views, stack, strict=True):
            if block is not row[k]:
                row[k].copy_(block)
        stack.clear()
        bucket.missing -= 1
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._launch(self._buckets[self._launched])
            self._launched += 1

    def _launch(self, bucket: _Bucket) -> None:
        if self._plain:
            bucket.work = self._group.start_sum(bucket.total)
            return
        world, chunk = self._group.world, bucket.received.shape[1]
        outgoing = bucket.blocks.transpose(0, 1).contiguous().view(-1)
        bucket.work = self._group.start_exchange(
            bucket.received.view(-1),
            outgoing,
            [count * chunk for count in self._counts],
            [len(self._own) * chunk] * world,
        )

    def _fold_and_gather(self) -> None:
        # Two passes: a collective issued from within the first one's completion hangs on gloo.
        for bucket in self._buckets:
            self._wait(bucket)
            stack: list[Block] = []
            rows: list[Tensor] = []
            for block, row in zip(self._order, bucket.received, strict=True):
                rows.append(row)
                for _ in range(push_block(stack, block)):
                    right = rows.pop()
                    rows[-1].add_(right)
            bucket.work = self._group.start_gather(bucket.total, rows[0])
        for bucket in self._buckets:
            self._wait(bucket)

    def _wait(self, bucket: _Bucket) -> None:
        assert bucket.work is not None
        self._group.wait(bucket.work)
        bucket.work = None


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of `flat` at `offset` with the shape and memory layout of `like`."""
    return flat[offset : offset + like.numel()].as_strided(like.shape, like.stride(), flat.storage_offset() + offset)


def _pack(slots: list[nn.Parameter], world: int) -> list[_Bucket]:
    """Buckets of about BUCKET_BYTES in the order in which backward delivers: the extra vector, last layer first."""
    buckets: list[_Bucket] = []
    for i in reversed(range(len(slots))):
        numel = slots[i].numel()
        if not buckets or (buckets[-1].numel + numel) * 4 > BUCKET_BYTES:
            buckets.append(_Bucket([], [], 0))
        buckets[-1].members.append(i)
        buckets[-1].offsets.append(buckets[-1].numel)
        buckets[-1].numel += numel
    for bucket in buckets:
        bucket.numel = -(-bucket.numel // world) * world
    return buckets
