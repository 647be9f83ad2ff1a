"""Who is in a run whose workers come and go without waiting for each other. Part of the dispatcher."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import time

from orchestrator.channel import Beat, Pulse
from orchestrator.events import WorkerLeft
from orchestrator.membership import Membership
from orchestrator.recovery import Member
from orchestrator.shards import Placement


@dataclass(frozen=True)
class Held(Placement):
    """The shards that a lost worker computed, whatever its rank."""

    def range_of(self, rank: int) -> range:
        return range(self.bounds[0], self.bounds[-1])


class Crowd(Membership):
    """A member is seated as soon as it comes; one that is lost ends nothing for the others."""

    left: Callable[[str], None]  # a member is gone
    held: Callable[[str], range]  # the shards that it computes
    looked: Callable[[], None]  # ten times a second

    def enter(self, member: Member) -> Member:
        """Seat a member, with the lowest rank that is free."""
        now, taken = time(), {m.rank for m in self.roster.seated.values()}
        rank = min(set(range(len(taken) + 1)) - taken)
        self.roster.ready.pop(member.id, None)
        self.roster.seated[member.id] = replace(member, rank=rank)
        self._pulses[member.id] = Pulse(now, now, Beat(0, 0, 0, True))
        self._suspicion.can_train(now)
        return self.roster.seated[member.id]

    def let_go(self, member: Member) -> None:
        """A member leaves that computes nothing now: its node will go."""
        self._journal.log(WorkerLeft("node_drained", member.rank, member.node, member.pid, "", member.home))
        self._excluded.add(member.id)
        self.roster.lose(member.id)
        self._pulses.pop(member.id, None)
        self.left(member.id)

    def seat(self) -> None:
        """Nobody waits for a seat."""
        self.looked()

    def save(self) -> None:
        """No worker has the state."""

    def pause(self, kind: str = "") -> None:
        """There is no step boundary at which all could pause."""

    def _incident(self) -> int:  # each loss is one
        return len(self._excluded)

    def _check_connections(self, now: float, limit_s: float) -> None:
        """Workers wait for servers, not for each other."""

    def _end_generation(self, kind: str, detail: str, silent_s: float) -> None:
        if not self.stopping:
            self._journal.break_off(kind, detail, len(self.roster.seated), silent_s)

    def lose(self, member_id: str, kind: str, detail: str) -> None:
        """See Membership."""
        seated = member_id in self.roster.seated and not self.over
        if seated:
            held = self.held(member_id)
            self.placement = Held((held.start, held.stop)) if held else Held((0,))
        super().lose(member_id, kind, detail)
        if seated:
            self.left(member_id)
