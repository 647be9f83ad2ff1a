"""Who computes which stretch of a split that is evaluated, and that each counts once. Pure; workers are names."""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import TrainingError
from orchestrator.handout import Counted, Handout, Unit

BLOCKS_EACH = 8  # of a worker, so that the last one to finish keeps the others waiting for an eighth of its work
MOST_CHUNKS = 16  # of a block, so that a loss costs seconds
DEATHS = 4  # over one block, or before a worker was ready: no accident; as in suspicion.Suspicion
LEAST_S, MEDIANS = 30.0, 20.0  # until a block is taken from a worker that does not get on
FIRST_S = 9_600.0  # the same for one of MOST_CHUNKS, while nobody knows how long one takes


def block_chunks(chunks: int, workers: int) -> int:
    """Chunks of a block; no figure depends on it."""
    return min(MOST_CHUNKS, max(1, chunks // (BLOCKS_EACH * workers)))


@dataclass
class Held:
    """A block that a worker computes, since `since_s`."""

    number: int
    since_s: float


class Tally:
    """Hands blocks of chunks out to whoever asks, in order, and keeps what each chunk adds to the totals.

    Attributes:
        names: of the sums, once there are any.
        samples_done: of the finished blocks.
    """

    def __init__(self, samples: int, chunk: int, workers: int) -> None:
        """Args:
        samples: there are, from 0 on.
        chunk: samples that are summed together.
        workers: that are expected.
        """
        self._samples, self._chunk = samples, chunk
        self._chunks = -(-samples // chunk)
        self._size = block_chunks(self._chunks, workers)
        self._blocks = -(-self._chunks // self._size)
        self._handout = Handout(Counted(lambda _: 1), self._blocks, math.inf)
        self._held: dict[str, Held] = {}
        self._rows: dict[int, NDArray[Any]] = {}
        self._deaths, self._seconds = Counter[int](), list[float]()
        self.names: tuple[str, ...] = ()
        self.samples_done = 0

    def _chunks_of(self, block: int) -> range:
        return range(block * self._size, min((block + 1) * self._size, self._chunks))

    def _samples_of(self, block: int) -> range:
        chunks = self._chunks_of(block)
        return range(chunks.start * self._chunk, min(chunks.stop * self._chunk, self._samples))

    @property
    def complete(self) -> bool:
        return self._handout.complete

    @property
    def left(self) -> int:
        """Blocks that are not done."""
        return self._blocks - len(self._rows)

    def take(self, worker: str, now_s: float) -> range | None:
        """The chunks that `worker` computes next; None: nothing is left to begin."""
        unit = self._handout.take(worker)
        if unit is None:
            return None
        self._held[worker] = Held(unit.step, now_s)
        return self._chunks_of(unit.step)

    def finish(self, worker: str, names: tuple[str, ...], rows: NDArray[Any], now_s: float) -> None:
        """`worker` has computed what it held: `rows` [chunks, names] of sums."""
        held = self._held.pop(worker)
        if self._handout.finish(worker, Unit(held.number, 0)):
            self._rows[held.number], self.names = rows, names
            self.samples_done += len(self._samples_of(held.number))
            self._seconds.append(now_s - held.since_s)

    def lose(self, worker: str) -> None:
        """A worker is gone: what it held is for others; raises TrainingError where that is no accident."""
        self._handout.take_back(worker)
        held = self._held.pop(worker, None)
        if held is None:
            return
        self._deaths[held.number] += 1
        if self._deaths[held.number] >= DEATHS:
            lost = self._samples_of(held.number)
            raise TrainingError(
                f"{DEATHS} workers were lost over the held-out samples {lost.start} to {lost.stop - 1}: give a worker "
                "more memory with --resources-per-worker, or look at these samples"
            )

    def stuck(self, now_s: float) -> list[str]:
        """Workers that hold a block for far longer than others needed for one."""
        limit_s = max(LEAST_S, MEDIANS * median(self._seconds)) if self._seconds else FIRST_S * self._size / MOST_CHUNKS
        return [worker for worker, held in self._held.items() if now_s - held.since_s > limit_s]

    def rows(self) -> NDArray[Any]:
        """The sums of all chunks [chunks, names], in their order, whoever computed them."""
        return np.concatenate([self._rows[block] for block in range(self._blocks)])
