"""How blocks of gradients get from worker to worker on CPUs, and where their sums are left.

Workers of one machine add up what lies in memory that all of them see. Between machines chunks go by messages straight
from where they lie to where they are added (routes.py), a block as soon as its last shard is computed; a thread adds
and sends on what has come while the backward pass goes on.
"""

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.collectives import Exchange, HalvesSum
from orchestrator.group import Group
from orchestrator.lots import Lot, Piece, gather, padded_numel
from orchestrator.routes import Routes
from orchestrator.shards import Placement
from orchestrator.sharedmemory import share
from orchestrator.tree import Bucket, Transport, fold

WINDOW = 4  # pieces that there is room for before they are added; more would not stay in a cache
HERE_TAG = 0  # of a word within a team: all blocks of a lot are there; all totals are there and nothing is sent


class TreeSums:
    """Workers on one machine or on several."""

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket]) -> None:
        self._group, self._messages = group, group.messages()
        starts = list(accumulate((padded_numel(bucket.numel) for bucket in buckets), initial=0))
        floats = [(len(placement.blocks_of(rank)) + 1) * starts[-1] for rank in range(group.world)]
        teams, memory = share(group, floats)
        self._routes = routes = Routes(placement, teams, group.rank)
        self._beside = [rank for rank in routes.team if rank != group.rank]
        self.common = bool(self._beside)
        gathered = gather(buckets)
        self._lots = [Lot(each, routes) for each in gathered]
        ends = list(accumulate(map(len, gathered), initial=0))
        for lot, first, end in zip(self._lots, ends, ends[1:], strict=False):
            lot.lay(memory, starts[first:end], routes)
        self._completed_by = {end - 1: number for number, end in enumerate(ends[1:])}  # the lot's last bucket
        self._cuts_before = list(accumulate((max(map(len, lot.cuts)) for lot in self._lots), initial=0))
        own = [(number, n) for number, lot in enumerate(self._lots) for n in range(len(lot.cuts[group.rank]))]
        self._own_pieces, self._place = own, {piece: at for at, piece in enumerate(own)}
        room = max((p.floats.stop - p.floats.start for lot in self._lots for p in lot.cuts[group.rank]), default=0)
        self._window = torch.empty(WINDOW, len(routes.late), room)
        self._last_place = len(placement.blocks_of(group.rank)) - 1
        self._words = torch.zeros(group.world)
        self._sent: list[dist.Work] = []
        self._open = False  # whether a step was started and is not finished
        self._helper = group.errands("sums")

    def start(self) -> None:
        self._open = True
        for lot in self._lots:
            lot.forget()
        if self._routes.outside:
            self._helper.start(self._expect)

    def launch(self, bucket: int, place: int) -> None:
        number = self._completed_by.get(bucket)
        if number is None:
            return  # it travels with those that follow
        lot, routes, last = self._lots[number], self._routes, place == self._last_place
        if lot.lone:
            lot.take((routes.rank, place), last)
            if last:
                self._expect_totals(number)
        part = routes.sent_alone.get(place)
        if part is not None:
            for chunk in routes.outside:
                for n, piece in enumerate(lot.cuts[chunk]):
                    self._send(lot.row((routes.rank, place), piece), chunk, self._tag(number, n, part))
        if last:
            if routes.outside:
                self._tell_team()
                self._helper.start(self._carry, number)
            elif lot is self._lots[-1]:  # nothing is on its way: one word that all is there will do
                self._tell_team()

    def finish(self) -> None:
        with self._group.others_wait():
            if self._routes.outside:
                self._helper.start(self._take_totals)
            else:
                self._helper.start(self._meet_team)
            self._helper.finish()
        if not self._routes.outside:
            for lot in self._lots:
                for piece in lot.cuts[self._group.rank]:
                    self._add(lot, piece, -1)
        with self._group.others_wait():
            self._helper.run(self._conclude)
        for lot in self._lots:
            lot.let_go()
        self._open = False

    def close(self) -> None:
        if self._open:
            self._group.hang_up()  # the helper may wait for others, and they for this worker
        self._messages.close()
        self._helper.close()
        self._sent.clear()  # messages under way keep their connection open
        for lot in self._lots:
            lot.arrivals.clear()
            lot.totals.clear()
        self._lots, self._window = [], torch.empty(0)  # memory is not for a helper that was left behind to keep

    def _take_totals(self) -> None:
        for lot in self._lots:
            self._messages.complete(lot.totals)

    def _conclude(self) -> None:
        """All is added up everywhere, and nothing of it is under way."""
        self._settle_sent()
        self._tell_team()
        self._meet_team()
        self._settle_sent()

    def _tag(self, number: int, piece: int, part: int = -1) -> int:
        """Of a message about a piece of a chunk of a lot: with a part, or with the total."""
        before = self._cuts_before[number] + piece
        return HERE_TAG + 2 + before * (len(self._routes.parts) + 1) + part

    def _send(self, tensor: Tensor, rank: int, tag: int) -> None:
        self._sent.append(self._messages.start_send(tensor, rank, tag))

    def _settle_sent(self) -> None:
        self._messages.complete(self._sent)
        self._sent.clear()

    def _tell_team(self) -> None:
        """Each tells each: who is lost is missed by all, not by a neighbour alone as in a ring."""
        for rank in self._beside:
            self._send(self._words[rank : rank + 1], rank, HERE_TAG)

    def _meet_team(self) -> None:
        """Wait for the word of every other worker of the team."""
        receive = self._messages.start_receive
        self._messages.complete([receive(torch.empty(1), rank, HERE_TAG) for rank in self._beside])

    def _expect(self) -> None:
        """Say where messages shall go, so that they need not wait."""
        routes, receive = self._routes, self._messages.start_receive
        for number, lot in enumerate(self._lots):
            lot.arrivals = [
                [
                    receive(self._received(lot, part, piece, -1), routes.incoming[part], self._tag(number, n, part))
                    for part in routes.early
                ]
                for n, piece in enumerate(lot.cuts[routes.rank])
            ]
            if not lot.lone:
                self._expect_totals(number)
        for at in range(min(WINDOW, len(self._own_pieces))):
            self._make_room(at)

    def _expect_totals(self, number: int) -> None:
        lot, receive = self._lots[number], self._messages.start_receive
        lot.totals = [
            receive(lot.total(piece), chunk, self._tag(number, n))
            for chunk in self._routes.totals_from
            for n, piece in enumerate(lot.cuts[chunk])
        ]

    def _make_room(self, at: int) -> None:
        """For the last parts of a piece."""
        number, n = self._own_pieces[at]
        lot, routes = self._lots[number], self._routes
        piece = lot.cuts[routes.rank][n]
        for part in routes.late:
            room = self._received(lot, part, piece, at)
            lot.arrivals[n].append(
                self._messages.start_receive(room, routes.incoming[part], self._tag(number, n, part))
            )

    def _received(self, lot: Lot, part: int, piece: Piece, at: int) -> Tensor:
        if part in lot.early:
            return lot.early_part(part, piece)
        return self._window[at % WINDOW, self._routes.late.index(part), : piece.floats.stop - piece.floats.start]

    def _carry(self, number: int) -> None:
        """Send what the team has to add first; add what comes for the own chunk, and send the total."""
        lot, routes = self._lots[number], self._routes
        self._meet_team()
        for part, chunk in routes.sent_together:
            of = routes.parts[part].of
            for n, piece in enumerate(lot.cuts[chunk]):
                rows = [lot.row(own, piece) for own in of]
                fold([routes.block(own) for own in of], rows, rows[0])
                self._send(rows[0], chunk, self._tag(number, n, part))
        for n, piece in enumerate(lot.cuts[routes.rank]):
            at = self._place[number, n]
            self._messages.complete(lot.arrivals[n])
            total = self._add(lot, piece, at)
            for rank in routes.totals_to:
                self._send(total, rank, self._tag(number, n))
            if at + WINDOW < len(self._own_pieces):
                self._make_room(at + WINDOW)

    def _add(self, lot: Lot, piece: Piece, at: int) -> Tensor:
        """The total of a piece of the own chunk."""
        total = lot.total(piece)
        rows = [
            self._received(lot, source, piece, at) if isinstance(source, int) else lot.row(source, piece)
            for _, source in self._routes.addends
        ]
        fold([block for block, _ in self._routes.addends], rows, total)
        return total


def transport(group: Group, placement: Placement, buckets: list[Bucket]) -> Transport:
    """That of this kind of device; gives the buckets their memory. Every worker calls it."""
    return (TreeSums if group.device.type == "cpu" else of_gpus)(group, placement, buckets)


def of_gpus(group: Group, placement: Placement, buckets: list[Bucket]) -> Transport:
    """By collectives; see `transport`."""
    if [len(placement.blocks_of(rank)) for rank in range(group.world)] == [1, 1]:
        return HalvesSum(group, buckets)
    return Exchange(group, placement, buckets)
