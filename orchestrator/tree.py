"""Buckets of gradients, and blocks of them added in the tree's order."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.shards import Block, push_block

CACHED_FLOATS = 2**16  # of each of several rows: what was added is added to while it is still in a core's cache


@dataclass
class Bucket:
    """A stretch of parameters whose gradients travel together.

    Attributes:
        members, offsets: the parameters in it, and where each begins.
        numel: of all members, and of gaps that nobody reads, for each begins at a cache line.
        alone: whether there is one member, without gaps in its memory.
        missing: parameters whose gradients are not yet in the block that is being filled.
        blocks: fp32 [own blocks, numel], where each block's gradients are laid; None: it is in `row`.
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
    """Leave the sum of `rows`, one for each block of `order`, in `total`; rows are overwritten.

    Args:
        rows: [numel] each, as `total`.
    """
    if len(rows) == 1:
        total.copy_(rows[0])
        return
    pairs = _pairs(order)
    whole = [*rows, total]
    in_cache = len(pairs) > 1 and total.is_cpu
    for *parts, into in zip(*(tensor.split(CACHED_FLOATS) for tensor in whole), strict=True) if in_cache else [whole]:
        for left, right in pairs[:-1]:
            torch.add(parts[left], parts[right], out=parts[left])
        left, right = pairs[-1]
        torch.add(parts[left], parts[right], out=into)


def _pairs(order: list[Block]) -> list[tuple[int, int]]:
    """Which rows are added, one pair after the other, each into the first of it."""
    blocks: list[Block] = []
    stack: list[int] = []
    found: list[tuple[int, int]] = []
    for row, block in enumerate(order):
        stack.append(row)
        for _ in range(push_block(blocks, block)):
            right = stack.pop()
            found.append((stack[-1], right))
    return found
