"""Gradients summed over shards by one fixed binary tree, whoever computed which shard.

On a worker each parameter has a pairwise stack: a shard's gradient is pushed as autograd delivers it, and while
the two topmost blocks are siblings of the tree they are added, so few gradients are alive: log2(shards) + 1 for an
aligned range, at most twice that for any.
A contiguous range of shards ends as a few aligned blocks. Between workers the blocks travel in buckets
(transport.py), launched as soon as the backward pass of a block's last shard has filled them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from orchestrator.group import Group
from orchestrator.lots import padded_numel
from orchestrator.shards import Block, Placement, push_block
from orchestrator.slice_sums import SliceSums
from orchestrator.transport import transport
from orchestrator.tree import Bucket, Transport

BUCKET_BYTES = 8 * 2**20
ALONE_BYTES = 2**20  # on CPUs a parameter from that size on is a bucket of its own: nothing has to be copied for it


class TreeReducer:
    """Sums gradients, and one extra vector a shard, over all shards of a step in tree order.

    Use: `start_shard(v)`, backward, for every own shard in ascending order, then `finish()`; `p.grad` then holds
    the sum over all shards, and `extra` that of the extra vectors. Unless they were asked for as the worker's own,
    p.grad and `extra` may be memory that the workers share: they are read, never written, and until the next step.
    """

    def __init__(self, parameters: list[nn.Parameter], extra_numel: int, group: Group) -> None:
        self._group = group
        device = group.device
        # The extra vector rides as one more parameter.
        self._extra_slot = nn.Parameter(torch.empty(extra_numel, device=device), requires_grad=False)
        self._slots = [*parameters, self._extra_slot]
        self._stacks: list[list[Tensor]] = [[] for _ in self._slots]
        self._pushed = [0] * len(self._slots)
        self._buckets = _pack(self._slots, ALONE_BYTES if device.type == "cpu" else 2**63)
        self._home = {i: number for number, bucket in enumerate(self._buckets) for i in bucket.members}
        self._launched = 0
        self._shards_done = 0
        self._merges = 0
        self._ends: list[int] = []  # the shard after each own block
        self._filling = -1  # which own block the started shard is the last of; -1: of none
        self._range = range(0)
        self._transport: Transport | None = None
        self._places: list[list[Tensor]] = [
            [] for _ in self._slots
        ]  # by own block; empty: gradients stay where they are
        self._blocks: list[Block] = []
        self.extra = torch.zeros(extra_numel, device=device)
        self._handles = [p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in enumerate(parameters)]

    def close(self) -> None:
        """Let go of the parameters, and of a step that was not finished."""
        for handle in self._handles:
            handle.remove()
        if self._transport is not None:
            self._transport.close()

    def place(self, placement: Placement) -> None:
        """Take over a placement, once. Every worker of the group calls it."""
        assert self._transport is None
        self._range = placement.range_of(self._group.rank)
        if self._group.world == 1:
            return
        self._ends = [block.start + block.size for block in placement.blocks_of(self._group.rank)]
        carrier = SliceSums if self._group.device.type == "xla" else transport
        self._transport = carrier(self._group, placement, self._buckets)
        for bucket in self._buckets:
            for row in [] if bucket.blocks is None else bucket.blocks:
                for i, offset in _members(bucket):
                    self._places[i].append(_view(row, offset, self._slots[i]))

    def start_step(self) -> None:
        """Forget the last step's gradients (a stale .grad view would silently break equality)."""
        for p in self._slots:
            p.grad = None
        self._shards_done = 0
        self._pushed = [0] * len(self._slots)
        self._blocks = []
        if self._transport is not None:
            self._transport.start()

    def start_shard(self, shard: int) -> None:
        """The next backward pass is that of `shard`."""
        assert shard == self._range.start + self._shards_done
        self._merges = push_block(self._blocks, Block(shard, 1))
        self._filling = self._ends.index(shard + 1) if shard + 1 in self._ends else -1
        self._launched = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)

    def add_extra(self, vector: Tensor) -> None:
        """The started shard's extra vector, [extra_numel]."""
        self._push(len(self._slots) - 1, vector)

    def add_gradient(self, i: int, gradient: Tensor) -> None:
        """The started shard's gradient of parameter `i`, where no hook of it sees the backward pass."""
        self._push(i, gradient)

    def end_shard(self) -> None:
        """After the backward pass: parameters that the shard did not use get a zero gradient."""
        self._shards_done += 1
        for i, pushed in enumerate(self._pushed):
            if pushed < self._shards_done:
                self._push(i, torch.zeros_like(self._slots[i]))

    def finish(self, own: bool = False) -> None:
        """Wait for the other workers; p.grad and `extra` hold the sums.

        Args:
            own: whether p.grad will be written to.

        Raises:
            PeerLostError: another worker is lost.
        """
        if self._group.world == 1:
            for slot, stack in zip(self._slots, self._stacks, strict=True):
                slot.grad = stack.pop()
        else:
            assert self._transport is not None
            self._transport.finish()
            self._group.settle()
            for bucket in self._buckets:
                total = bucket.total.clone() if own and self._transport.common else bucket.total
                for i, offset in _members(bucket):
                    self._slots[i].grad = _view(total, offset, self._slots[i])
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
        place = self._places[i][self._filling] if self._filling >= 0 and self._places[i] else None
        for merge in range(self._merges, 0, -1):
            right = stack.pop()
            if merge == 1 and place is not None:
                _add_into(place, stack.pop(), right)
            else:
                stack[-1].add_(right)
        if self._filling >= 0:
            bucket = self._buckets[self._home[i]]
            if place is None:
                bucket.row = _flat(stack.pop(), self._slots[i])
            elif not self._merges:
                place.copy_(stack.pop())
            self._deliver(bucket)

    def _deliver(self, bucket: Bucket) -> None:
        """One more of its gradients is in its place: launch every bucket whose turn it is."""
        bucket.missing -= 1
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            assert self._transport is not None
            self._transport.launch(self._launched, self._filling)
            self._launched += 1


def _members(bucket: Bucket) -> Iterator[tuple[int, int]]:
    return zip(bucket.members, bucket.offsets, strict=True)


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of `flat` at `offset` with the shape and memory layout of `like`."""
    if flat.device.type == "xla":  # its tensors have no layout of their own
        return flat[offset : offset + like.numel()].view(like.shape)
    return flat[offset : offset + like.numel()].as_strided(like.shape, like.stride(), flat.storage_offset() + offset)


def _flat(gradient: Tensor, like: Tensor) -> Tensor:
    """The elements of `gradient` as they lie in the memory of `like`, which has no gaps."""
    if gradient.stride() != like.stride():
        gradient = torch.empty_like(like).copy_(gradient)
    return gradient.detach().as_strided((like.numel(),), (1,))


def _add_into(place: Tensor, left: Tensor, right: Tensor) -> None:
    if place.device.type == "xla":  # a view there: its graph has copies into it, but no outputs
        place.copy_(left + right)
    else:
        torch.add(left, right, out=place)


def _has_gaps(tensor: Tensor) -> bool:
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return span != tensor.numel()


def _pack(slots: list[nn.Parameter], alone_bytes: int) -> list[Bucket]:
    """Buckets in the order in which backward fills them: it begins with the extra vector and the last layer.

    Parameters of `alone_bytes` or more have one each, others share them, up to BUCKET_BYTES.
    """
    full: list[Bucket] = []
    open_one = Bucket([], [], 0)
    for i in reversed(range(len(slots))):
        numel = slots[i].numel()
        if numel * 4 >= alone_bytes and not _has_gaps(slots[i]):
            full.append(Bucket([i], [0], numel, alone=True))
            continue
        if open_one.members and (open_one.numel + numel) * 4 > BUCKET_BYTES:
            full.append(open_one)
            open_one = Bucket([], [], 0)
        open_one.members.append(i)
        open_one.offsets.append(open_one.numel)
        # From a cache line on, as where it is alone: GPUs add a norm in another order where memory is not aligned.
        open_one.numel += padded_numel(numel)
    return [*full, open_one] if open_one.members else full
