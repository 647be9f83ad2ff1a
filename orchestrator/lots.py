"""Buckets of gradients that travel together, cut into a chunk for each worker and into pieces of one message each."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.routes import Own, Routes
from orchestrator.tree import Bucket

LOT_FLOATS = 2**21  # gradients that are alone are gathered up to that many: a message costs more than its bytes
PIECE_FLOATS = 5 * 2**17  # of one message at most: it is added while the next is on its way, and fits into a cache
LINE_FLOATS = 16  # of a cache line: no two workers write to the same


class Piece(NamedTuple):
    """What one message has.

    Attributes:
        bucket: of the lot, which.
        floats: of that bucket.
        at: where it begins in its chunk.
    """

    bucket: int
    floats: slice
    at: int


class Lot:
    """Buckets and their memory.

    Attributes:
        rows: the blocks of the team, by rank and place: of each bucket fp32 [numel].
        cuts: the chunk of each worker.
        lone: whether nobody else sees its memory and each bucket is one gradient: then the sum takes its place.
        early: fp32 [this worker's chunk], parts that come before they can be added, by number.
        arrivals: messages with parts, by piece.
        totals: messages with totals.
    """

    def __init__(self, buckets: list[Bucket], routes: Routes) -> None:
        self.buckets = buckets
        self.rows: dict[Own, list[Tensor]] = {}
        self.cuts = cuts([bucket.numel for bucket in buckets], routes.world)
        self.lone = len(routes.team) == 1 and all(bucket.alone for bucket in buckets)
        own = self.cuts[routes.rank]
        self._chunk = own[-1].at + _length(own[-1].floats) if own else 0
        self.early = {number: torch.empty(self._chunk) for number in routes.early}
        self.arrivals: list[list[dist.Work]] = []
        self.totals: list[dist.Work] = []

    def lay(self, memory: dict[int, Tensor], starts: Sequence[int], routes: Routes) -> None:
        """Take the stretch from each bucket's start of what each worker of the team gives for its blocks and the total.

        Args:
            memory: of each worker of the team, fp32, flat.
            starts: of each bucket, if every worker had one block and no total.
        """
        if self.lone:
            return
        for start, bucket in zip(starts, self.buckets, strict=True):
            n, padded = bucket.numel, padded_numel(bucket.numel)
            for rank, floats in memory.items():
                count = len(routes.placement.blocks_of(rank))
                laid = floats[start * (count + 1) :][: padded * (count + 1)].view(count + 1, padded)[:, :n]
                if rank == routes.team[0]:
                    bucket.total = laid[count]
                for place in range(count):
                    self.rows.setdefault((rank, place), []).append(laid[place])
                if rank == routes.rank:
                    bucket.blocks = laid[:count]

    def take(self, own: Own, last: bool) -> None:
        """A lone worker's gradients are all there, of a block or of its last one."""
        self.rows[own] = [bucket.row for bucket in self.buckets]
        if last:
            # Of each chunk the total comes when who adds it has all of this block: nobody needs it here any more.
            for bucket in self.buckets:
                bucket.total = bucket.row

    def row(self, own: Own, piece: Piece) -> Tensor:
        """The piece of a block of the team."""
        return self.rows[own][piece.bucket][piece.floats]

    def total(self, piece: Piece) -> Tensor:
        """The piece of the sum."""
        return self.buckets[piece.bucket].total[piece.floats]

    def early_part(self, part: int, piece: Piece) -> Tensor:
        """Where a piece of this worker's chunk is kept until it can be added."""
        return self.early[part][piece.at : piece.at + _length(piece.floats)]

    def let_go(self) -> None:
        """Of blocks that are added up: the sum is in the place of the last one."""
        if self.lone:
            self.rows.clear()
            for bucket in self.buckets:
                bucket.row = torch.empty(0)

    def forget(self) -> None:
        """The last step."""
        self.arrivals, self.totals = [], []
        self.let_go()
        if self.lone:
            for bucket in self.buckets:
                bucket.total = torch.empty(0)


def gather(buckets: list[Bucket]) -> list[list[Bucket]]:
    """Buckets in lots: those that are alone with those that follow, until they are enough."""
    lots: list[list[Bucket]] = []
    for bucket in buckets:
        before = lots[-1] if lots else []
        if bucket.alone and before and before[-1].alone and sum(each.numel for each in before) < LOT_FLOATS:
            before.append(bucket)
        else:
            lots.append([bucket])
    return lots


def cuts(numels: list[int], world: int) -> list[list[Piece]]:
    """Buckets laid end to end, each from a cache line on, in a chunk of about one size for each worker."""
    starts = list(accumulate(map(padded_numel, numels), initial=0))
    chunk = -(-starts[-1] // (world * LINE_FLOATS)) * LINE_FLOATS
    found: list[list[Piece]] = []
    for rank in range(world):
        pieces, at = [], 0
        for bucket, (start, numel) in enumerate(zip(starts, numels, strict=False)):
            first, end = max(0, rank * chunk - start), min(numel, (rank + 1) * chunk - start)
            for floats in _split(first, end):
                pieces.append(Piece(bucket, floats, at))
                at += _length(floats)
        found.append(pieces)
    return found


def padded_numel(numel: int) -> int:
    """To the end of a cache line."""
    return -(-numel // LINE_FLOATS) * LINE_FLOATS


def _split(start: int, end: int) -> list[slice]:
    """A stretch in pieces of about one size, as few as can be."""
    if start >= end:
        return []
    count = -(-(end - start) // PIECE_FLOATS)
    size = min(PIECE_FLOATS, -(-(end - start) // (count * LINE_FLOATS)) * LINE_FLOATS)
    return [slice(at, min(at + size, end)) for at in range(start, end, size)]


def _length(floats: slice) -> int:
    return int(floats.stop - floats.start)
