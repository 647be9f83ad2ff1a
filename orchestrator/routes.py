"""Who sends which parts of the gradients to whom, so that all get the sum of the tree.

Workers that see each other's memory are a team: those of one machine. A bucket of gradients is cut into as many
chunks as there are workers, and each worker adds up its own chunk of all blocks. What a team can add by itself is
added before it is sent, so a block crosses from one machine to another once, in chunks, and so does each chunk's total.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.shards import Block, Placement, push_block

Own = tuple[int, int]  # a rank, and which of its blocks
Teams = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Part:
    """A block of the tree as a team has it.

    Attributes:
        block: which shards.
        of: the workers' blocks that it is the sum of, in the tree's order.
    """

    block: Block
    of: tuple[Own, ...]


def parts_of(placement: Placement, team: Sequence[int]) -> list[Part]:
    """What the blocks of a team's workers fold into, in the order of their shards."""
    blocks: list[Block] = []
    parts: list[Part] = []
    for rank in sorted(team):
        for place, block in enumerate(placement.blocks_of(rank)):
            merges = push_block(blocks, block)
            of = [own for part in parts[len(parts) - merges :] for own in part.of]
            del parts[len(parts) - merges :]
            parts.append(Part(blocks[-1], (*of, (rank, place))))
    return parts


def agent(team: Sequence[int], chunk: int, world: int) -> int:
    """Who of `team` handles the chunk of worker `chunk`, which is not of the team; spread evenly."""
    outside = [rank for rank in range(world) if rank not in team]
    return sorted(team)[outside.index(chunk) * len(team) // len(outside)]


@dataclass(frozen=True)
class Routes:
    """The part of worker `rank` in it.

    Attributes:
        teams: every worker in one of them.
    """

    placement: Placement
    teams: Teams
    rank: int

    @property
    def world(self) -> int:
        return self.placement.workers

    def block(self, own: Own) -> Block:
        """Which of the tree it is."""
        rank, place = own
        return self.placement.blocks_of(rank)[place]

    @cached_property
    def team(self) -> Sequence[int]:
        """This worker's."""
        return next(team for team in self.teams if self.rank in team)

    @cached_property
    def others(self) -> list[Sequence[int]]:
        """The teams that it is not of."""
        return [team for team in self.teams if self.rank not in team]

    @cached_property
    def outside(self) -> list[int]:
        """The workers of other teams, from its successor on: not all begin with the same one."""
        ring = ((self.rank + i) % self.world for i in range(1, self.world))
        return [rank for rank in ring if rank not in self.team]

    @cached_property
    def parts(self) -> list[Part]:
        """Those of all teams, in the order of their shards: numbers that all workers know them by."""
        found = [part for team in self.teams for part in parts_of(self.placement, team)]
        return sorted(found, key=lambda part: part.block.start)

    def sender(self, part: Part, chunk: int) -> int:
        """Who sends the chunk of worker `chunk` of a part of another team."""
        if len(part.of) == 1:
            return part.of[0][0]  # it lies there as it is sent, and early
        return agent(next(team for team in self.teams if part.of[0][0] in team), chunk, self.world)

    @cached_property
    def incoming(self) -> dict[int, int]:
        """What comes for its own chunk: number of a part -> who sends it."""
        return {
            number: self.sender(part, self.rank)
            for number, part in enumerate(self.parts)
            if part.of[0][0] not in self.team
        }

    @cached_property
    def early(self) -> list[int]:
        """Parts that come while their senders still compute: all that are not the last block of their sender."""
        return [number for number in self.incoming if not self._last(self.parts[number])]

    @cached_property
    def late(self) -> list[int]:
        """The other parts that come."""
        return [number for number in self.incoming if self._last(self.parts[number])]

    def _last(self, part: Part) -> bool:
        (rank, place), *others = part.of
        return bool(others) or place == len(self.placement.blocks_of(rank)) - 1

    @cached_property
    def addends(self) -> list[tuple[Block, Own | int]]:
        """What its own chunk is the sum of, in the tree's order: blocks of its team, and numbers of parts received."""
        found: list[tuple[Block, Own | int]] = []
        for number, part in enumerate(self.parts):
            if number in self.incoming:
                found.append((part.block, number))
            else:
                found += [(self.block(own), own) for own in part.of]
        return found

    @cached_property
    def sent_alone(self) -> dict[int, int]:
        """Its blocks that are parts of its team as they are: which -> number of the part."""
        return {
            part.of[0][1]: n for n, part in enumerate(self.parts) if len(part.of) == 1 and part.of[0][0] == self.rank
        }

    @cached_property
    def sent_together(self) -> list[tuple[int, int]]:
        """(number of a part that its team has to add first, whose chunk of it), for those that it adds and sends."""
        return [
            (number, chunk)
            for number, part in enumerate(self.parts)
            if len(part.of) > 1 and part.of[0][0] in self.team
            for chunk in self.outside
            if self.sender(part, chunk) == self.rank
        ]

    @cached_property
    def totals_to(self) -> list[int]:
        """Who gets the total of its own chunk: one of each other team."""
        return [agent(team, self.rank, self.world) for team in self.others]

    @cached_property
    def totals_from(self) -> list[int]:
        """Whose totals it gets, for its team."""
        return [chunk for chunk in self.outside if agent(self.team, chunk, self.world) == self.rank]
