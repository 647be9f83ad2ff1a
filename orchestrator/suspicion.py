"""When workers that are lost are no accident: facts and times come in, a reason to stop comes out."""

from collections import Counter
from dataclasses import dataclass, field

SILENT_DEATHS = 4  # that many, one after the other: of holders of one shard of one step, or of who never had a seat


@dataclass
class Suspicion:
    """Tells what breaks its workers, a step or the start, from machines that break."""

    _errors: dict[tuple[int, str], int] = field(default_factory=dict)
    _deaths: list[tuple[int, range]] = field(default_factory=list)
    _early: int = 0
    _early_s: float = -1.0

    def raised(self, step: int, error: str, generation: int) -> str:
        """A worker raised; returns why the run should stop, or "" to go on."""
        before = self._errors.setdefault((step, error), generation)
        return f"step {step} failed twice in the same way: {error}" if before < generation else ""

    def died(self, best_step: int, slack: int, shards: range) -> str:
        """A worker died without a word while it computed `shards`; returns why the run should stop, or "".

        Args:
            best_step: the most steps that the run ever had.
            slack: by how many steps that may be wrong: reports are on their way.
        """
        if not self._deaths or best_step > self._deaths[0][0] + slack:
            self._deaths = []
        self._deaths.append((best_step, shards))
        times = Counter(shard for _, held in self._deaths for shard in held)
        deadly = sorted(shard for shard, deaths in times.items() if deaths >= SILENT_DEATHS)
        if not deadly:
            return ""
        return (
            f"{SILENT_DEATHS} workers died one after the other at about step {best_step}, each while it held shards "
            f"{deadly}: a sample there seems to crash its reader"
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
