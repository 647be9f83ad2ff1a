"""Which microbatch is computed by whom, where nobody owns any: handed out, taken back, counted once.

The order of samples is that of every run (shards.py): microbatch (step, shard) holds the same samples whoever computes
it, and whenever. Pure: workers are names, and there is no clock.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(frozen=True, order=True)
class Unit:
    """One microbatch: what `shard` of `step` trains on."""

    step: int
    shard: int


@dataclass
class Counted:
    """A set of units that fills up about step by step.

    Attributes:
        width: number of units of a step, at least 1, which are its shards 0..width-1.
        step: all units of the steps before it are in the set.
        beyond: step -> shards, of those in the set from `step` on.
    """

    width: Callable[[int], int]
    step: int = 0
    beyond: dict[int, set[int]] = field(default_factory=dict)

    def __contains__(self, unit: Unit) -> bool:
        return unit.step < self.step or unit.shard in self.beyond.get(unit.step, ())

    def add(self, unit: Unit) -> bool:
        """Put a unit in; False if it was there."""
        if unit in self:
            return False
        self.beyond.setdefault(unit.step, set()).add(unit.shard)
        while len(self.beyond.get(self.step, ())) == self.width(self.step):
            del self.beyond[self.step]
            self.step += 1
        return True

    def flat(self) -> list[int]:
        """As numbers: the step, then step and shard of each unit beyond."""
        units = [number for step, shards in sorted(self.beyond.items()) for v in sorted(shards) for number in (step, v)]
        return [self.step, *units]

    @classmethod
    def of(cls, width: Callable[[int], int], flat: Sequence[int]) -> "Counted":
        """What `flat` gave."""
        counted = cls(width, flat[0])
        for step, shard in zip(flat[1::2], flat[2::2], strict=True):
            counted.beyond.setdefault(step, set()).add(shard)
        return counted


class Handout:
    """Hands the next unit to whoever asks, within the bound on staleness.

    A unit may be begun if its step is at most `bound` ahead of the oldest unfinished step. What a lost worker held is
    handed out again, before anything new; what was finished counts once, whoever finished it.
    """

    def __init__(self, finished: Counted, total_steps: int, bound: float) -> None:
        """Args:
        finished: before it begins.
        total_steps: of the run.
        bound: steps, or math.inf.
        """
        self._finished, self._total, self._bound = finished, total_steps, bound
        self._returned: list[Unit] = []  # a heap
        self._next = Unit(finished.step, 0)
        self._held: dict[str, set[Unit]] = {}

    @property
    def oldest(self) -> int:
        """The oldest unfinished step; as many are finished in their order."""
        return self._finished.step

    @property
    def complete(self) -> bool:
        """Whether every unit of the run is finished."""
        return self.oldest >= self._total

    def held(self, worker: str) -> frozenset[Unit]:
        """What a worker computes."""
        return frozenset(self._held.get(worker, ()))

    @property
    def holders(self) -> int:
        """Workers that compute something."""
        return len(self._held)

    @property
    def between_steps(self) -> bool:
        """Whether no step is begun and not finished."""
        return not (self._held or self._returned or self._finished.beyond)

    def take(self, worker: str, begin: bool = True) -> Unit | None:
        """The next unit, which `worker` holds from now on; None: nothing may be begun now.

        Args:
            begin: whether it may be the first one of a step.
        """
        unit = self._pick(begin)
        if unit is not None:
            self._held.setdefault(worker, set()).add(unit)
        return unit

    def _pick(self, begin: bool) -> Unit | None:
        while self._returned:
            unit = heapq.heappop(self._returned)
            if unit not in self._finished:
                return unit
        while self._next.step < self._total and self._next.step <= self.oldest + self._bound:
            if not (begin or self._next.shard or max(self._finished.beyond, default=-1) >= self._next.step):
                break
            unit = self._next
            last = unit.shard + 1 >= self._finished.width(unit.step)
            self._next = Unit(unit.step + 1, 0) if last else Unit(unit.step, unit.shard + 1)
            if unit not in self._finished:
                return unit
        return None

    def finish(self, worker: str, unit: Unit) -> bool:
        """`worker` has computed `unit` and it is applied; False if that had been counted before."""
        self._release(worker, unit)
        return self._finished.add(unit)

    def _release(self, worker: str, unit: Unit) -> None:
        held = self._held.get(worker, set())
        held.discard(unit)
        if not held:
            self._held.pop(worker, None)

    def take_back(self, worker: str) -> list[Unit]:
        """A worker is gone: what it held and did not finish is handed out again; returns that."""
        lost = sorted(self._held.pop(worker, ()))
        elsewhere = set().union(*self._held.values()) if self._held else set()
        for unit in lost:
            if unit not in self._finished and unit not in elsewhere:
                heapq.heappush(self._returned, unit)
        return lost


def ranges(sizes: Sequence[int], parts: int) -> list[range]:
    """Contiguous, non-empty ranges of items, at most `parts`, the largest as small as can be.

    Args:
        sizes: of the items, in their order.
    """
    parts = min(parts, len(sizes))
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(sizes, middle)) <= parts else (middle + 1, high)
    cuts = _cuts(sizes, low)
    while len(cuts) < parts:  # fewer ranges were enough: split where there is something to split
        at = max(range(len(cuts)), key=lambda n: (len(cuts[n]) > 1, sum(sizes[i] for i in cuts[n])))
        whole = cuts[at]
        cuts[at : at + 1] = [range(whole.start, whole.stop - 1), range(whole.stop - 1, whole.stop)]
    return cuts


def _cuts(sizes: Sequence[int], most: int) -> list[range]:
    """Greedy ranges of at most `most` each; no item is larger."""
    bounds, filled = [0], 0
    for number, size in enumerate(sizes):
        if filled + size > most:
            bounds.append(number)
            filled = 0
        filled += size
    return [range(low, high) for low, high in zip(bounds, [*bounds[1:], len(sizes)], strict=True)]


def offsets(sizes: Iterable[int]) -> list[int]:
    """Where each item begins, and the end."""
    return [0, *accumulate(sizes)]
