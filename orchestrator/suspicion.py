"""When workers that are lost are no accident: facts and times come in, a reason to stop comes out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

SILENT_DEATHS = 4  # that many, one after the other: of holders of one shard of one step, or of who never had a seat
FRUITLESS_GENERATIONS = 5  # in a row, by the same step, of workers that lost a connection


@dataclass
class Suspicion:
    """Tells what breaks its workers, a step or the start, from machines that break."""

    _errors: dict[tuple[int, str], int] = field(default_factory=dict)
    _best: int = -1
    _deaths: list[tuple[int, range]] = field(default_factory=list)
    _lost: Counter[int] = field(default_factory=Counter)  # workers, by incident
    _early: int = 0
    _early_s: float = -1.0

    def raised(self, step: int, error: str, generation: int) -> str:
        """A worker raised; returns why the run should stop, or "" to go on."""
        before = self._errors.setdefault((step, error), generation)
        return f"step {step} failed twice in the same way: {error}" if before < generation else ""

    def died(self, best_step: int, slack: int, shards: range, step: int | None = None) -> str:
        """A worker died without a word while it computed `shards`; returns why the run should stop, or "".

        Args:
            best_step: the most steps that the run ever had.
            slack: by how many steps that, and `step`, may be wrong: reports are on their way.
            step: that the worker was in, if the run is behind its best.
        """
        if not self._deaths or best_step > self._best + slack:
            self._deaths, self._best = [], best_step
        step = best_step if step is None else step
        self._deaths.append((step, shards))
        times = Counter(shard for other, held in self._deaths for shard in held if abs(other - step) <= slack)
        deadly = sorted(shard for shard, deaths in times.items() if deaths >= SILENT_DEATHS)
        if not deadly:
            return ""
        return (
            f"{SILENT_DEATHS} workers died one after the other at about step {step}, each while it held shards "
            f"{deadly}: a sample there seems to crash its reader"
        )

    def lost(self, incident: int, allowed: int) -> str:
        """A worker was lost; returns why the run should stop, or "": so many incidents are `allowed`.

        Those of one generation are one incident: a node takes all its workers along, a switch all its nodes.
        """
        self._lost[incident] += 1
        workers, incidents = self._lost.total(), len(self._lost)
        often = "" if workers == incidents else f" in {incidents} incidents"
        return (
            f"{workers} workers were lost{often}, and --max-incidents allows {allowed}" if incidents > allowed else ""
        )

    def ended_early(self, came_s: float, now_s: float) -> bool:
        """A worker ended before it had a seat while no other was there; whether that is no accident any more.

        Args:
            came_s: when it came; those that came before the last such end was counted may have ended with it.
        """
        if came_s >= self._early_s:
            self._early, self._early_s = self._early + 1, now_s
        return self._early >= SILENT_DEATHS

    def can_train(self, now_s: float) -> None:
        """Somebody has a seat, or waits for one: ends of those that came before tell nothing about the run."""
        self._early, self._early_s = 0, now_s


@dataclass
class Unreachable:
    """Workers that cannot reach each other, though all of them reach the coordinator.

    Whose fault it is is told by the errors of the others, which name its address; where they do not, it is the worker
    of the highest rank among those that were there when the trouble began.
    """

    _step: int = -1
    _times: int = 0
    _there: frozenset[str] = frozenset()
    _errors: dict[str, set[str]] = field(default_factory=dict)

    def note(self, step: int, there: Mapping[str, str], voter: str, error: str) -> str:
        """A generation ended because a connection was lost; returns who is to be given up, or "".

        Args:
            step: how many steps are committed.
            there: who sat in it, in the order of ranks, and their addresses.
            voter: who has lost a connection; "": nobody says so.
            error: as it saw it.
        """
        if step != self._step:
            self._step, self._times, self._there, self._errors = step, 0, frozenset(there), {}
        self._times += 1
        self._errors.setdefault(voter, set()).add(error)
        if self._times <= FRUITLESS_GENERATIONS:
            return ""
        self._times = 0
        suspects = [member for member in there if member in self._there] or list(there)
        votes = {member: self._votes(member, there[member]) for member in suspects}
        most = max(votes.values(), default=0)
        return next((member for member in reversed(suspects) if votes[member] == most or most < 2), "")

    def _votes(self, member: str, address: str) -> int:
        """How many of the others have named it."""
        named = [voter for voter, errors in self._errors.items() if any(f"[{address}]" in e for e in errors)]
        return len([voter for voter in named if voter not in ("", member)]) if address else 0


@dataclass
class Newcomers:
    """Workers that cannot join a run that was training: what they lack the others have, and one of them may have it."""

    _refused: int = 0

    def spare(self, missed: bool) -> bool:
        """One more; whether the run goes on all the same.

        Args:
            missed: whether it waits for somebody like this one.
        """
        self._refused += missed
        return self._refused < SILENT_DEATHS
