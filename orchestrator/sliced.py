"""Who trains next on TPUs: whole slices. A lost host takes its slice, a joining one waits until its slice is there."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.recovery import Member, Roster


@dataclass
class SliceRoster(Roster):
    """A roster whose members are seated by slices of `chips` members; minimum and maximum are whole slices."""

    chips: int = 1

    def _slices(self, members: Iterable[Member]) -> list[list[Member]]:
        """The slices that are whole among these members, each in the order of its chips."""
        found: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            found[member.slice].append(member)
        return [sorted(mates, key=lambda m: m.place) for mates in found.values() if len(mates) == self.chips]

    def _going(self, member: Member) -> bool:
        if not self.draining:  # it is asked of everyone, ten times a second
            return False
        everyone = (*self.ready.values(), *self.seated.values())
        return any(m.node in self.draining for m in (member, *everyone) if m.slice == member.slice)

    def _there(self) -> list[Member]:
        return [member for mates in self._slices(self.ready.values()) for member in mates]

    def _choose(self, candidates: list[Member], now: float) -> list[Member]:
        """See Roster; candidates are whole slices."""
        slices = sorted(self._slices(candidates), key=lambda mates: (self._avoided(mates[0], now), *_standing(mates)))
        chosen, newest = slices[: self.maximum // self.chips], min(slices, key=_standing)
        if newest[0].step > max(mates[0].step for mates in chosen):
            chosen = [newest, *chosen[:-1]]
        return [member for mates in chosen for member in mates]

    def _ranked(self, members: list[Member]) -> list[Member]:
        """See Roster; slice after slice, within one in the order that XLA numbers its chips."""
        return [member for mates in sorted(self._slices(members), key=_standing) for member in mates]

    def lose(self, member_id: str) -> Member | None:
        """See Roster; its slice's other members train no more either. Ray Train ends their processes."""
        member = super().lose(member_id)
        for mate in [m for m in self.seated.values() if member and m.slice == member.slice]:
            super().lose(mate.id)
        return member


def _standing(mates: list[Member]) -> tuple[int, bool, int]:
    """By which slices are ranked: the one that hands its state over, through its first member, is the first."""
    return (-mates[0].step, mates[0].rank < 0, mates[0].rank)
