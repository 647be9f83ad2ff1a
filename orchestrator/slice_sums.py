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
from orchestrator.transport import transport
from orchestrator.tree import Bucket, Transport


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
        self._chunks = [Bucket([], [], -(-bucket.numel // self._size)) for bucket in buckets]
        self._blocks: list[Tensor] = []
        self._totals: list[Tensor] = []
        for bucket, chunk in zip(buckets, self._chunks, strict=True):
            padded, own = chunk.numel * self._size, len(placement.blocks_of(group.rank))
            self._blocks.append(torch.zeros(own, padded, device=group.device))
            self._totals.append(torch.empty(padded, device=group.device))
            bucket.blocks, bucket.total = self._blocks[-1], self._totals[-1]
        self._outer: Transport | None = None
        if slices.workers > 1:
            among = group.among([list(range(p, group.world, self._size)) for p in range(self._size)])
            among.device = torch.device("cpu")
            self._outer = transport(among, slices, self._chunks)
        self._kept = kept

    def start(self) -> None:
        """See Transport."""

    def launch(self, number: int, place: int) -> None:
        """Nothing yet: a graph that ends in the middle of the backward pass would be two."""

    def finish(self) -> None:
        """See Transport."""
        folded = [self._fold(*each) for each in zip(self._blocks, self._chunks, strict=True)]
        compute_now(self._group.device)
        if self._outer is None:
            sums = [rows[0] for rows in folded]
        else:
            self._outer.start()
            for place in range(self._kept):
                for number, (chunk, rows) in enumerate(zip(self._chunks, folded, strict=True)):
                    assert chunk.blocks is not None
                    chunk.blocks[place].copy_(rows[place])
                    self._outer.launch(number, place)
            self._outer.finish()
            sums = [chunk.total.to(self._group.device) for chunk in self._chunks]
        for total, own in zip(self._totals, sums, strict=True):
            if self._size == 1:
                total.copy_(own)
            else:
                gather_single(total, own.contiguous(), self._group.inside)
        compute_now(self._group.device)

    def close(self) -> None:
        """See Transport."""
        if self._outer is not None:
            self._outer.close()

    def _fold(self, blocks_of_all: Tensor, of: Bucket) -> list[Tensor]:
        """This worker's chunk of the slice's blocks, [kept][numel / workers of the slice]."""
        if self._size == 1:
            return list(blocks_of_all)
        chunk = of.numel
        sent = torch.zeros(self._size, self._rows, chunk, device=self._group.device)
        own = blocks_of_all.view(-1, self._size, chunk).transpose(0, 1)
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
