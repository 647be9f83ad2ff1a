"""Who trains next where a model is held in parts: whole replica groups, and where the state comes from.

The state of a run survives as long as it is whole somewhere: in parts, with workers that hold all of them after the
same step, or with one that took all of it along when its generation ended at a step boundary. Otherwise everyone goes
back to the newest checkpoint.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config import RunConfig
from orchestrator.layout import usable
from orchestrator.recovery import GATHER_S, SETTLE_S, START_GRACE_S, Holding, Member, Roster
from orchestrator.sliced import SliceRoster
from orchestrator.slices import shape_of
from orchestrator.values import Parallel


def by_parts(members: Sequence[Member], size: int, step: int) -> list[list[Member]]:
    """For each part of `size`, the members that hold it after `step`, those whose group is whole first."""
    held = [m for m in members if m.step == step and m.holds.parts == size]
    present = Counter(m.rank // size for m in held)
    held.sort(key=lambda m: present[m.rank // size] < size)
    return [[m for m in held if m.holds.part == part] for part in range(size)]


def seats(members: Sequence[Member], count: int, size: int, saved: int = -1) -> tuple[list[Member], int]:
    """`count` of the members in groups of `size`, in rank order, and the step that they go on from; -1: a checkpoint's.

    Rank 0's group holds the state, or rank 0 the whole of it; other groups are made of who holds the right parts, as
    far as there are any.

    Args:
        members: those before others are seated before them.
        saved: step of the newest checkpoint: who waits since before it has nothing that is worth going back to.
    """
    for step in sorted({m.step for m in members if m.step >= max(0, saved)}, reverse=True):
        parts = by_parts(members, size, step)
        carriers = [m for m in members if m.step == step and m.holds.whole]
        if all(parts):
            return _filled([], parts, members, count, size), step
        if carriers:
            return _filled(carriers[:1], parts, members, count, size), step
    return list(members[:count]), -1


def _filled(
    first: list[Member], parts: list[list[Member]], members: Sequence[Member], count: int, size: int
) -> list[Member]:
    """Seats for those who hold the right parts, then for the others where some are left."""
    order: list[Member | None] = [*first]
    seated, fitting = {m.id for m in first}, [iter(part) for part in parts]  # nobody holds two parts
    for place in range(len(first), count):
        found = next((m for m in fitting[place % size] if m.id not in seated), None)
        order.append(found)
        seated |= {found.id} if found else set()
    others = iter([m for m in members if m.id not in seated])
    return [m or next(others) for m in order]


@dataclass
class ReplicaRoster(Roster):
    """A roster whose members are seated in whole groups only."""

    parallel: Parallel = Parallel()
    shards: int = 1

    def _most(self, there: int) -> int:
        """How many of so many can be seated; 0: fewer than the run needs."""
        count = usable(self.parallel, min(there, self.maximum), self.shards)
        return count if count >= self.minimum else 0

    def form(self, now: float) -> list[Member] | None:
        """See Roster; members are told to go on from a checkpoint (step -1) where nobody has the state."""
        if self.training or self.seated:
            return None
        everyone = sorted(self.ready.values(), key=lambda m: (self._avoided(m, now), m.rank < 0, m.rank, m.node))
        fresh = all(m.step < 0 for m in everyone)
        settled = now - self._joined_s >= (START_GRACE_S if fresh else GATHER_S)
        if not self._most(len(everyone)):
            return None
        if (fresh or self.gather) and len(everyone) < self.expected and not settled:
            return None
        self.gather = False
        staying = [m for m in everyone if not self._avoided(m, now)]
        order, step, self.size, _ = max(
            (self._choice(found) for found in (staying, everyone) if self._most(len(found))), key=lambda c: c[3]
        )
        order = [dataclasses.replace(m, step=m.step if step >= 0 else -1) for m in order]
        self.seated = {m.id: m for m in order}
        self.ready = {key: m for key, m in self.ready.items() if key not in self.seated}
        if step < 0:  # what those who wait on have is of steps that are taken anew
            self.ready = {k: dataclasses.replace(m, step=-1, holds=Holding()) for k, m in self.ready.items()}
        self.generation += 1
        self.training = True
        return order

    def _choice(self, members: Sequence[Member]) -> tuple[list[Member], int, int, int]:
        """(rank order, step, workers of a group, the step all the same): as many as can be, but fewer where those alone
        have the state.

        The third is -1 where they go on from a checkpoint, and the last is that checkpoint's step.
        """
        most = self._most(len(members))
        counts = [most]
        if not self.parallel.size:  # a group of another size has other parts
            counts += sorted({m.holds.parts for m in members if self.minimum <= m.holds.parts < most}, reverse=True)
        sizes = [(count, self.parallel.size or count) for count in counts]
        saved = max([self.saved, *(m.step for m in members if m.holds.saved)])  # the last may not be known here yet
        found = [(*seats(members, count, size, saved), size) for count, size in sizes]
        return max(((*choice, max(choice[1], saved)) for choice in found), key=lambda choice: choice[3])

    def wants_pause(self, now: float) -> bool:
        """See Roster; joiners are worth it if they make another whole group."""
        if not self.training or now - self._joined_s < SETTLE_S:
            return False
        staying = [m for m in self.seated.values() if m.node not in self.draining]
        joining = [m for m in self.ready.values() if not self._avoided(m, now)]
        most = self._most(len(staying) + len(joining))
        leaves = len(staying) < len(self.seated) and most > 0
        return bool(staying or joining) and (leaves or most > len(self.seated))

    @property
    def saves(self) -> bool:
        """See Roster: the first and the last of a group take the whole state along (SplitState.carries)."""
        leave = any(map(self._leaves, self.seated.values()))
        ends = [m for m in self.seated.values() if m.rank % max(1, self.size) in (0, self.size - 1)]
        return leave and all(map(self._leaves, ends))

    def must_leave(self, member: Member) -> bool:
        """See Roster."""
        if not self._leaves(member):
            return False
        others = [m for m in (*self.ready.values(), *self.seated.values()) if not self._leaves(m)]
        if not self._most(len(others)):
            return False
        return member.holds.saved or self._choice(others)[3] >= member.step

    def missing(self) -> int:
        """See Roster."""
        there = len(self.ready) + len(self.seated)
        if not self.generation:
            return max(0, self.expected - there)
        least = next((n for n in range(there, self.maximum + 1) if self._most(n)), self.maximum)
        return least - there


def roster_of(config: RunConfig, maximum: int, expected: int) -> Roster:
    """The roster of a run; a number of workers that it may fall to makes one replica group at least."""
    least = config.workers.floor
    if config.accelerator == "tpu":
        chips = shape_of(config.accelerator_type, config.topology).chips
        return SliceRoster(max(least, chips), maximum, expected, chips=chips)
    if not config.parallel.splits:
        return Roster(least, maximum, expected)
    return ReplicaRoster(least, maximum, expected, parallel=config.parallel, shards=config.shards)


def must_share(order: Sequence[Member], size: int) -> bool:
    """Whether rank 0's group hands the state to somebody: not all have theirs already."""
    return any(
        (m.step, m.holds.part, m.holds.parts) != (order[0].step, rank % size, size) for rank, m in enumerate(order)
    )
