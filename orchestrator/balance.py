"""How many shards each worker gets: from measured speeds, and only when moving pays. No clock, no I/O.

A step takes as long as its slowest worker: the best shares give everyone about the same time. Bits do not depend
on shares, so they may follow the machines as closely as measurement allows.
"""

import heapq
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.shards import Placement, even_placement, placement_from_counts

SMOOTH_S = 4.0  # time constant of a measured pace
KNOWN_S = 2.0  # a pace that was measured for less is not acted upon
ODD = 3.0  # times its pace that a worker is believed at once
IDLE_S = 1.0  # without computing, that counts: longer ones are pauses and evaluations
LEAST_GAIN = 0.05  # of a step's time: measured paces vary by a few percent
PAYBACK_S = 60.0  # what a move costs has to be won back three times in this time, or until the run's end
PAYBACK_TIMES = 3.0
MOST_STRAGGLERS = 2  # that are looked at: the slowest
SLOW = 1.5  # a worker that needs so many times the median is a straggler


@dataclass
class ShardPace:
    """How long a worker computes for a shard, waiting for nobody; an exponential average over SMOOTH_S seconds.

    Attributes:
        shard_s: seconds a shard; 0: not known.
        known_s: for how many seconds it was measured.
    """

    shard_s: float = 0.0
    known_s: float = 0.0

    def measured(self, shards: int, busy_s: float, since_s: float = 0.0) -> None:
        """It computed `shards` in `busy_s` seconds.

        Args:
            since_s: seconds since it was measured before: with few shards it computes for a small part of them.
        """
        if shards <= 0 or busy_s <= 0:
            return
        most_s = ODD * shards * self.shard_s if self.known_s >= KNOWN_S else math.inf
        if busy_s > most_s:  # a wait for storage, or a loader that starts: soon over
            busy_s = since_s = most_s
        weight_s = max(busy_s, min(since_s, busy_s + IDLE_S))
        # What is known so far counts for at most SMOOTH_S seconds, and at first for what it is.
        old = min(self.known_s, SMOOTH_S) * math.exp(-weight_s / SMOOTH_S)
        self.shard_s = (self.shard_s * old + busy_s / shards * weight_s) / (old + weight_s)
        self.known_s += busy_s


def shares(shards: int, speeds: Sequence[float]) -> list[int]:
    """Shards for each worker, at least one each, so that the slowest is done as early as can be.

    One after the other, each shard goes to the worker that would be done with it first: D'Hondt's method, which
    never gives less than the whole part of a proportional share (Balinski and Young, Fair Representation, 1982), so
    only what is beyond that has to be dealt out one by one.

    Args:
        speeds: shards a second, or any multiple of it; above 0.
    """
    speed = np.asarray(speeds, dtype=np.float64)
    assert len(speed) <= shards
    assert (speed > 0).all()
    counts: list[int] = _whole_parts(shards, speed).tolist()
    pace: list[float] = speed.tolist()
    left = shards - sum(counts)
    done_s = [((count + 1) / pace[rank], rank) for rank, count in enumerate(counts)] if left else []
    heapq.heapify(done_s)
    for _ in range(left):
        rank = done_s[0][1]
        counts[rank] += 1
        heapq.heapreplace(done_s, ((counts[rank] + 1) / pace[rank], rank))
    return counts


def _whole_parts(shards: int, speed: NDArray[np.float64]) -> NDArray[np.int64]:
    """Proportional shares rounded down, but at least one each; who gets that one has no part in the rest."""
    one = np.zeros(len(speed), dtype=bool)
    while True:
        rest = shards - int(one.sum())
        quota = np.where(one, 1.0, rest * speed / max(float(speed[~one].sum()), 1e-300))
        few = ~one & (quota < 1.0)
        if not few.any():
            return np.maximum(1, np.floor(quota + 1e-9)).astype(np.int64)
        one |= few


def step_seconds(counts: Sequence[int], shard_s: Sequence[float]) -> float:
    """Seconds that the slowest worker computes."""
    return max(count * seconds for count, seconds in zip(counts, shard_s, strict=True))


def best_seconds(shards: int, shard_s: NDArray[np.float64]) -> float:
    """step_seconds of the best shares, without dealing them out: the least time in which `shards` can be done."""
    low = max(shards / float((1 / shard_s).sum()), float(shard_s.max()))  # each worker has one at least
    high = low + float(shard_s.max())  # in which rounding down costs nobody more than one
    for _ in range(50):
        middle = (low + high) / 2
        if int(np.floor(middle / shard_s * (1 + 1e-12)).sum()) >= shards:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Move:
    """A better placement.

    Attributes:
        counts: shards for each worker, in rank order.
        gain: share of a step's time that it is expected to save.
    """

    counts: list[int]
    gain: float


def better(
    counts: Sequence[int], paces: Sequence[ShardPace], step_s: float, steps_left: int, cost_s: float
) -> Move | None:
    """Other shares, if they win more than moving costs; None: stay.

    Args:
        counts: shards now, in rank order.
        paces: of the workers, in rank order.
        step_s: seconds of a step now; what is beyond the slowest worker's computing does not change.
        steps_left: of the run.
        cost_s: seconds that training stands still for a move.
    """
    if len(counts) < 2 or any(pace.known_s < KNOWN_S for pace in paces):
        return None
    shard_s = [pace.shard_s for pace in paces]
    new = shares(sum(counts), [1 / seconds for seconds in shard_s])
    saved_s = step_seconds(counts, shard_s) - step_seconds(new, shard_s)
    gain = saved_s / max(step_s, step_seconds(counts, shard_s))
    steps = min(steps_left, PAYBACK_S / step_s)
    if gain < LEAST_GAIN or saved_s * steps < PAYBACK_TIMES * cost_s:
        return None
    return Move(new, gain)


def speeds(paces: Sequence[ShardPace], declared: Sequence[float]) -> list[float]:
    """Shards a second of each worker, as measured; one that is not known yet by what is declared of it.

    Args:
        paces: in rank order.
        declared: speeds of the machines relative to each other; 0: nothing is said of it, so it is a usual one.
    """
    usual = statistics.median([speed for speed in declared if speed] or [1.0])
    declared = [speed or usual for speed in declared]
    known = [p.known_s >= KNOWN_S for p in paces]
    ratios = [1 / p.shard_s / d for p, d, sure in zip(paces, declared, known, strict=True) if sure]
    unit = statistics.median(ratios) if ratios else 1.0
    return [1 / p.shard_s if sure else d * unit for p, d, sure in zip(paces, declared, known, strict=True)]


def placement(shards: int, speeds: Sequence[float]) -> Placement:
    """Even shares, or others where they make a step shorter by LEAST_GAIN."""
    even, counts, shard_s = even_placement(shards, len(speeds)), shares(shards, speeds), [1 / s for s in speeds]
    best_s, even_s = step_seconds(counts, shard_s), step_seconds([len(own) for own in even], shard_s)
    return placement_from_counts(counts) if best_s < even_s * (1 - LEAST_GAIN) else even


@dataclass(frozen=True)
class Straggler:
    """A worker that is much slower than the others.

    Attributes:
        rank: of the worker.
        slower: times the median of the others.
        cost: share of the step's time that would be saved if it were as fast as they are.
        worse_than_none: whether the run would be faster without it.
    """

    rank: int
    slower: float
    cost: float
    worse_than_none: bool


def stragglers(shards: int, paces: Sequence[ShardPace]) -> list[Straggler]:
    """Who is slow, judged by the best shares that each may have; nobody until all paces are known."""
    if len(paces) < 2 or any(pace.known_s < KNOWN_S for pace in paces):
        return []
    shard_s = [pace.shard_s for pace in paces]
    # The median of the others is at least this; looking at each one's others would take minutes for thousands.
    low = sorted(shard_s)[(len(shard_s) - 2) // 2]
    slow = sorted((s, rank) for rank, s in enumerate(shard_s) if s >= SLOW * low)[-MOST_STRAGGLERS:]
    found: list[Straggler] = []
    everyone = np.asarray(shard_s)
    now_s = best_seconds(shards, everyone) if slow else 0.0
    for seconds, rank in reversed(slow):
        others = np.delete(everyone, rank)
        usual = float(np.median(others))
        if seconds < SLOW * usual:
            continue
        mended_s, without_s = best_seconds(shards, np.append(others, usual)), best_seconds(shards, others)
        found.append(Straggler(rank, seconds / usual, 1 - mended_s / now_s, without_s < now_s * (1 - 1e-9)))
    return found
