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
from orchestrator.routes import Own, Routes
from orchestrator.shards import Placement
from orchestrator.sharedmemory import share
from orchestrator.tree import Bucket, Transport, fold

PIECE_FLOATS = 3 * 2**17  # of one message at most: it is added while the next is on its way, and fits into a cache
WINDOW = 4  # pieces that there is room for before they are added; more would not stay in a cache
LINE_FLOATS = 16  # of a cache line: no two workers write to the same
HERE_TAG = 0  # of a word within a team: all blocks of a bucket are there; all totals are there and nothing is sent


class _Lot:
    """A bucket and its memory.

    Attributes:
        rows: fp32 [numel], the blocks of the team, by rank and place.
        cuts: the chunk of each worker, as pieces of one message each.
        lone: whether nobody else sees its memory and it is one gradient: then the sum takes its place.
        early: fp32 [this worker's chunk], parts that come before they can be added, by number.
        arrivals: messages with parts, by piece.
        totals: messages with totals.
    """

    def __init__(self, bucket: Bucket, routes: Routes) -> None:
        self.bucket = bucket
        self.rows: dict[Own, Tensor] = {}
        n = bucket.numel
        chunk = -(-n // (routes.world * LINE_FLOATS)) * LINE_FLOATS
        ends = [(min(n, rank * chunk), min(n, (rank + 1) * chunk)) for rank in range(routes.world)]
        self.cuts = [_pieces(start, end) for start, end in ends]
        self.lone = bucket.alone and len(routes.team) == 1
        self.start, end = ends[routes.rank]
        self.early = {number: torch.empty(end - self.start) for number in routes.early}
        self.arrivals: list[list[dist.Work]] = []
        self.totals: list[dist.Work] = []

    def lay(self, memory: dict[int, Tensor], start: int, routes: Routes) -> None:
        """Take the stretch from `start` of what each worker of the team gives for its blocks and the total."""
        if self.lone:
            return
        n, padded = self.bucket.numel, padded_numel(self.bucket)
        for rank, floats in memory.items():
            count = len(routes.placement.blocks_of(rank))
            laid = floats[start * (count + 1) :][: padded * (count + 1)].view(count + 1, padded)[:, :n]
            if rank == routes.team[0]:
                self.bucket.total = laid[count]
            self.rows.update({(rank, place): laid[place] for place in range(count)})
            if rank == routes.rank:
                self.bucket.blocks = laid[:count]

    def forget(self) -> None:
        """The last step."""
        self.arrivals, self.totals = [], []
        if self.lone:
            self.rows.clear()
            self.bucket.row = self.bucket.total = torch.empty(0)


def _pieces(start: int, end: int) -> list[slice]:
    """A stretch in pieces of about one size, as few as can be."""
    if start == end:
        return []
    count = -(-(end - start) // PIECE_FLOATS)
    size = min(PIECE_FLOATS, -(-(end - start) // (count * LINE_FLOATS)) * LINE_FLOATS)
    return [slice(at, min(at + size, end)) for at in range(start, end, size)]


def padded_numel(bucket: Bucket) -> int:
    """To the end of a cache line."""
    return -(-bucket.numel // LINE_FLOATS) * LINE_FLOATS


class TreeSums:
    """Workers on one machine or on several."""

    def __init__(self, group: Group, placement: Placement, buckets: list[Bucket]) -> None:
        self._group, self._messages = group, group.messages()
        starts = list(accumulate(map(padded_numel, buckets), initial=0))
        floats = [(len(placement.blocks_of(rank)) + 1) * starts[-1] for rank in range(group.world)]
        teams, memory = share(group, floats)
        self._routes = routes = Routes(placement, teams, group.rank)
        self._beside = [rank for rank in routes.team if rank != group.rank]
        self.common = bool(self._beside)
        self._lots = [_Lot(bucket, routes) for bucket in buckets]
        for lot, start in zip(self._lots, starts, strict=False):
            lot.lay(memory, start, routes)
        self._cuts_before = list(accumulate((len(lot.cuts[0]) for lot in self._lots), initial=0))
        own = [(number, n) for number, lot in enumerate(self._lots) for n in range(len(lot.cuts[group.rank]))]
        self._own_pieces, self._place = own, {piece: at for at, piece in enumerate(own)}
        self._window = torch.empty(WINDOW, len(routes.late), PIECE_FLOATS)
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

    def launch(self, number: int, place: int) -> None:
        lot, routes = self._lots[number], self._routes
        if lot.lone:
            lot.rows[routes.rank, place] = lot.bucket.row
            if place == self._last_place:
                # Of each chunk the total comes when who adds it has all of this block: nobody needs it here any more.
                lot.bucket.total = lot.bucket.row
                self._expect_totals(number)
        part = routes.sent_alone.get(place)
        if part is not None:
            row = lot.rows[routes.rank, place]
            for chunk in routes.outside:
                for n, piece in enumerate(lot.cuts[chunk]):
                    self._send(row[piece], chunk, self._tag(number, n, part))
        if place == self._last_place:
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
        """Of a message about a piece of a chunk of a bucket: with a part, or with the total."""
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
            receive(lot.bucket.total[piece], chunk, self._tag(number, n))
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

    def _received(self, lot: _Lot, part: int, piece: slice, at: int) -> Tensor:
        if part in lot.early:
            return lot.early[part][piece.start - lot.start : piece.stop - lot.start]
        return self._window[at % WINDOW, self._routes.late.index(part), : piece.stop - piece.start]

    def _carry(self, number: int) -> None:
        """Send what the team has to add first; add what comes for the own chunk, and send the total."""
        lot, routes = self._lots[number], self._routes
        self._meet_team()
        for part, chunk in routes.sent_together:
            of = routes.parts[part].of
            for n, piece in enumerate(lot.cuts[chunk]):
                rows = [lot.rows[own][piece] for own in of]
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

    def _add(self, lot: _Lot, piece: slice, at: int) -> Tensor:
        """The total of a piece of the own chunk."""
        total = lot.bucket.total[piece]
        rows = [
            self._received(lot, source, piece, at) if isinstance(source, int) else lot.rows[source][piece]
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
