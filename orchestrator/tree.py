"""Buckets of gradients, and blocks of them added in the tree's order."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.shards import Block, push_block


@dataclass
class Bucket:
    """A stretch of parameters whose gradients travel together.

    Attributes:
        members, offsets: the parameters in it, and where each begins.
        numel: of all members.
        alone: whether there is one member, without gaps in its memory.
        missing: parameters whose gradients are not yet in the block that is being filled.
        blocks: fp32 [own blocks, numel], where each block's gradients are laid end to end; None: it is in `row`.
        row: fp32 [numel], the gradient of the member that is alone, in the block that is being filled.
        total: fp32 [numel], the sum over all blocks.
    """

    members: list[int]
    offsets: list[int]
    numel: int
    alone: bool = False
    missing: int = 0
    blocks: Tensor | None = None
    row: Tensor = field(default_factory=lambda: torch.empty(0))
    total: Tensor = field(default_factory=lambda: torch.empty(0))


class Transport(Protocol):
    """Sums the blocks of all workers in tree order, bucket by bucket.

    Attributes:
        common: whether `total` is one memory for several workers, so that nobody may write to it.
    """

    common: bool

    def start(self) -> None:
        """A step begins."""
        ...

    def launch(self, number: int, place: int) -> None:
        """The worker's block `place` of bucket `number` is complete here; block by block, each bucket by bucket."""
        ...

    def finish(self) -> None:
        """Wait until all totals are complete; raises PeerLostError if a worker is lost."""
        ...

    def close(self) -> None:
        """No step comes any more; one that was not finished is given up."""
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
