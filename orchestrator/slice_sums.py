"""Gradients summed on TPUs: within a slice by XLA, between slices over their hosts' network, all in the tree's order.

The workers of a slice have neighbouring shards, so a slice is to the others what a worker is elsewhere. Within, each
worker receives its chunk of every block of the slice (all-to-all) and folds them as far as the slice's own shards go.
Chunks then travel between those who have the same one, through gloo, for slices come and go while XLA's groups cannot;
at last each slice gathers the chunks. The device computes everything up to a chunk as one graph.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.devices import compute_now
from orchestrator.group import Group, gather_single
from orchestrator.shards import Block, Placement, push_block
from orchestrator.transport import Bucket, Transport, transport


class SliceSums:
    """A Transport; see the module.

    Args:
        group: of all workers; its `inside` is that of this worker's slice.
    """

    common = False

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket]) -> None:
        self._group, self._buckets = group, buckets
        self._size = group.inside.size() if group.inside is not None else 1
        first = group.rank // self._size * self._size
        mine = [placement.blocks_of(rank) for rank in range(first, first + self._size)]
        self._counts = [len(blocks) for blocks in mine]
        self._order = [block for blocks in mine for block in blocks]
        self._rows = max(self._counts)
        slices = Placement(placement.bounds[:: self._size])
        kept = len(slices.blocks_of(group.rank // self._size))
        for bucket in buckets:
            bucket.blocks = torch.zeros(len(placement.blocks_of(group.rank)), bucket.numel, device=group.device)
            bucket.total = torch.empty(bucket.numel, device=group.device)
        self._chunks = [Bucket([], [], bucket.numel // self._size) for bucket in buckets]
        self._outer: Transport | None = None
        if slices.workers > 1:
            among = group.among([list(range(p, group.world, self._size)) for p in range(self._size)])
            among.device = torch.device("cpu")
            self._outer = transport(among, slices, self._chunks)
        self._kept = kept

    def launch(self, bucket: Bucket) -> None:
        """Nothing yet: a graph that ends in the middle of the backward pass would be two."""

    def finish(self) -> None:
        """See Transport."""
        folded = [self._fold(bucket) for bucket in self._buckets]
        compute_now(self._group.device)
        if self._outer is None:
            sums = [rows[0] for rows in folded]
        else:
            for chunk, rows in zip(self._chunks, folded, strict=True):
                for place, row in zip(chunk.blocks, rows, strict=True):
                    place.copy_(row)
                self._outer.launch(chunk)
            self._outer.finish()
            sums = [chunk.total.to(self._group.device) for chunk in self._chunks]
        for bucket, own in zip(self._buckets, sums, strict=True):
            if self._size == 1:
                bucket.total.copy_(own)
            else:
                gather_single(bucket.total, own.contiguous(), self._group.inside)
        compute_now(self._group.device)

    def _fold(self, bucket: Bucket) -> list[Tensor]:
        """This worker's chunk of the slice's blocks, [kept][numel / workers of the slice]."""
        if self._size == 1:
            return list(bucket.blocks)
        chunk = bucket.numel // self._size
        sent = torch.zeros(self._size, self._rows, chunk, device=self._group.device)
        own = bucket.blocks.view(-1, self._size, chunk).transpose(0, 1)
        sent[:, : own.shape[1]] = own
        received = torch.empty_like(sent)  # XLA exchanges equal parts only
        dist.all_to_all_single(received, sent, group=self._group.inside)
        rows = [received[i, row] for i, count in enumerate(self._counts) for row in range(count)]
        stack, blocks = list[Tensor](), list[Block]()
        for block, row in zip(self._order, rows, strict=True):
            stack.append(row)
            for _ in range(push_block(blocks, block)):
                right = stack.pop()
                stack[-1] = stack[-1] + right
        assert len(stack) == self._kept
        return stack
