"""How blocks of gradients get from worker to worker on CPUs, and where their sums are left.

Workers of one machine add up what lies in memory that all of them see. Between machines chunks go by messages straight
from where they lie to where they are added (routes.py), a block as soon as its last shard is computed; a thread adds
and sends on what has come while the backward pass goes on.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.collectives import Exchange, HalvesSum
from orchestrator.group import Group
from orchestrator.routes import Own, Routes
from orchestrator.shards import Placement
from orchestrator.sharedmemory import share
from orchestrator.tree import Bucket, Transport, fold

PIECE_FLOATS = 2**19  # of one message: it is added while the next is on its way
HERE_TAG = 0  # of a word within a team: all blocks of a bucket are there; all totals are there and nothing is sent


class _Lot:
    """A bucket and its memory; chunk c of a row is that of worker c.

    Attributes:
        rows: fp32 [workers, chunk], the blocks of the team, by rank and place.
        received: fp32 [chunk], what comes for this worker's chunk, by number of the part.
        total: fp32 [workers, chunk].
        pieces: of a chunk, one message each.
        arrivals: messages with parts, by piece.
        totals: messages with totals.
    """

    def __init__(self, bucket: Bucket, start: int, routes: Routes, memory: dict[int, Tensor]) -> None:
        n, world = bucket.numel, routes.world
        self.rows: dict[Own, Tensor] = {}
        for rank, floats in memory.items():
            count = len(routes.placement.blocks_of(rank))
            laid = floats[start * (count + 1) :][: n * (count + 1)].view(count + 1, n)
            self.rows.update({(rank, place): laid[place].view(world, -1) for place in range(count)})
            if rank == routes.rank:
                bucket.blocks = laid[:count]
            if rank == routes.team[0]:
                bucket.total = laid[count]
        self.total = bucket.total.view(world, -1)
        chunk = n // world
        self.received = {number: torch.empty(chunk) for number in routes.incoming}
        self.pieces = [slice(at, min(at + PIECE_FLOATS, chunk)) for at in range(0, chunk, PIECE_FLOATS)]
        self.arrivals: list[list[dist.Work]] = []
        self.totals: list[dist.Work] = []


class TreeSums:
    """Workers on one machine or on several."""

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket]) -> None:
        self._group = group
        numel = sum(bucket.numel for bucket in buckets)
        floats = [(len(placement.blocks_of(rank)) + 1) * numel for rank in range(group.world)]
        teams, memory = share(group, floats)
        self._routes = routes = Routes(placement, teams, group.rank)
        self._beside = [rank for rank in routes.team if rank != group.rank]
        self.common = bool(self._beside)
        starts = accumulate((bucket.numel for bucket in buckets), initial=0)
        self._lots = [_Lot(bucket, start, routes, memory) for bucket, start in zip(buckets, starts, strict=False)]
        self._pieces_before = list(accumulate((len(lot.pieces) for lot in self._lots), initial=0))
        self._last_place = len(placement.blocks_of(group.rank)) - 1
        self._words = torch.zeros(group.world)
        self._sent: list[dist.Work] = []
        self._errands: list[Future[None]] = []
        self._open = False  # whether a step was started and is not finished
        self._helper = ThreadPoolExecutor(1, "sums")

    def start(self) -> None:
        self._open = True
        if self._routes.outside:
            self._errand(self._expect)

    def launch(self, number: int, place: int) -> None:
        lot, routes = self._lots[number], self._routes
        part = routes.sent_alone.get(place)
        if part is not None:
            row = lot.rows[routes.rank, place]
            for n, piece in enumerate(lot.pieces):
                for chunk in routes.outside:
                    self._send(row[chunk][piece], chunk, self._tag(number, n, part))
        if place == self._last_place:
            if routes.outside:
                self._tell_team()
                self._errand(self._carry, number)
            elif lot is self._lots[-1]:  # nothing is on its way: one word that all is there will do
                self._tell_team()

    def finish(self) -> None:
        with self._group.others_wait():
            while self._errands:  # by no name: an error would keep itself, and the connections it was met on, alive
                self._errands.pop(0).result()
            for lot in self._lots:
                self._group.settle(lot.totals)
            if not self._routes.outside:
                self._meet_team()
        if not self._routes.outside:
            for lot in self._lots:
                self._add(lot, slice(None))
        with self._group.others_wait():
            self._settle_sent()
            self._tell_team()
            self._meet_team()
            self._settle_sent()
        self._open = False

    def close(self) -> None:
        if self._open:
            self._group.hang_up()  # the helper may wait for others, and they for this worker
        self._helper.shutdown(cancel_futures=True)
        self._errands.clear()  # messages under way keep their connection open, errors their messages
        self._sent.clear()
        for lot in self._lots:
            lot.arrivals.clear()
            lot.totals.clear()

    def _errand(self, do: Callable[..., None], *what: Any) -> None:
        """The helper does it, after what it was given before."""
        self._errands.append(self._helper.submit(do, *what))

    def _tag(self, number: int, piece: int, part: int = -1) -> int:
        """Of a message about a piece of a bucket: with a part, or with the total."""
        before = self._pieces_before[number] + piece
        return HERE_TAG + 2 + before * (len(self._routes.parts) + 1) + part

    def _send(self, tensor: Tensor, rank: int, tag: int) -> None:
        self._sent.append(self._group.start_send(tensor, rank, tag))

    def _settle_sent(self) -> None:
        self._group.settle(self._sent)
        self._sent.clear()

    def _tell_team(self) -> None:
        """Each tells each: who is lost is missed by all, not by a neighbour alone as in a ring."""
        for rank in self._beside:
            self._send(self._words[rank : rank + 1], rank, HERE_TAG)

    def _meet_team(self) -> None:
        """Wait for the word of every other worker of the team."""
        receive = self._group.start_receive
        self._group.settle([receive(torch.empty(1), rank, HERE_TAG) for rank in self._beside])

    def _expect(self) -> None:
        """Say where messages shall go, so that they need not wait."""
        routes, receive = self._routes, self._group.start_receive
        for number, lot in enumerate(self._lots):
            lot.arrivals = [
                [
                    receive(lot.received[part][piece], sender, self._tag(number, n, part))
                    for part, sender in routes.incoming.items()
                ]
                for n, piece in enumerate(lot.pieces)
            ]
            lot.totals = [
                receive(lot.total[chunk][piece], chunk, self._tag(number, n))
                for n, piece in enumerate(lot.pieces)
                for chunk in routes.totals_from
            ]

    def _carry(self, number: int) -> None:
        """Send what the team has to add first; add what comes for the own chunk, and send the total."""
        lot, routes = self._lots[number], self._routes
        self._meet_team()
        for n, piece in enumerate(lot.pieces):
            for part, chunk in routes.sent_together:
                of = routes.parts[part].of
                rows = [lot.rows[own][chunk][piece] for own in of]
                fold([routes.block(own) for own in of], rows, rows[0])
                self._send(rows[0], chunk, self._tag(number, n, part))
        for n, piece in enumerate(lot.pieces):
            self._group.settle(lot.arrivals[n])
            total = self._add(lot, piece)
            for rank in routes.totals_to:
                self._send(total, rank, self._tag(number, n))

    def _add(self, lot: _Lot, piece: slice) -> Tensor:
        """The total of a piece of the own chunk."""
        routes = self._routes
        total = lot.total[routes.rank][piece]
        rows = [
            (lot.received[source] if isinstance(source, int) else lot.rows[source][routes.rank])[piece]
            for _, source in routes.addends
        ]
        fold([block for block, _ in routes.addends], rows, total)
        return total


def transport(group: Group, placement: Placement, buckets: list[Bucket]) -> Transport:
    """That of this kind of device; gives the buckets their memory. Every worker calls it."""
    return (TreeSums if group.device.type == "cpu" else of_gpus)(group, placement, buckets)


def of_gpus(group: Group, placement: Placement, buckets: list[Bucket]) -> Transport:
    """By collectives; see `transport`."""
    if [len(placement.blocks_of(rank)) for rank in range(group.world)] == [1, 1]:
        return HalvesSum(group, buckets)
    return Exchange(group, placement, buckets)
