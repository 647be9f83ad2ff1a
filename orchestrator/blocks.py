"""The order of an epoch over data that lies in files: a few files at a time, all their samples mixed.

Reading sample after sample in an order over everything would fetch every file again for every sample. So files (blocks
of consecutive samples) are put in a random order, `window` of them at a time are opened, and within such a window the
samples are in a random order. With one window that is a shuffle of everything. Prepared data is mixed once when it is
written (orchestrator.prepare), so that a file's samples are no neighbours in the source.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.shards import derive_seed, sample_order

KEPT = 4  # epochs whose order of blocks is remembered: the last one, the next one


@dataclass(frozen=True)
class Opened:
    """One epoch's blocks in order.

    Attributes:
        blocks: int64, their numbers.
        starts: int64, one more than blocks: the place of the first sample of each in the epoch, and the end.
    """

    blocks: NDArray[np.int64]
    starts: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """An order of all samples for each epoch, a pure function of its arguments; any slice costs the same.

    Attributes:
        sizes: samples of each block; sample numbers count through them.
        window: blocks whose samples are mixed.
    """

    sizes: Sequence[int]
    window: int
    _epochs: dict[tuple[int, int], Opened] = field(default_factory=dict, repr=False)

    def opened(self, seed: int, epoch: int) -> Opened:
        """The order of the blocks in an epoch."""
        key = (seed, epoch)
        if key not in self._epochs:
            while len(self._epochs) >= KEPT:
                del self._epochs[next(iter(self._epochs))]
            count = len(self.sizes)
            blocks = sample_order(derive_seed("blocks", seed), epoch, count, 0, count)
            sizes = np.asarray(self.sizes, dtype=np.int64)[blocks]
            self._epochs[key] = Opened(blocks, np.concatenate([[0], np.cumsum(sizes)]))
        return self._epochs[key]

    @functools.cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The number of each block's first sample, and how many samples there are."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.sizes, dtype=np.int64))])

    def __call__(self, seed: int, epoch: int, size: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at places start..stop-1 of the epoch's order of `size` samples: int64 [stop - start]."""
        assert size == self.firsts[-1]
        opened = self.opened(seed, epoch)
        parts = [np.empty(0, np.int64)]
        while start < stop:
            place = int(np.searchsorted(opened.starts, start, side="right")) - 1
            number = place // self.window
            low, high = number * self.window, min((number + 1) * self.window, len(opened.blocks))
            begin, end = int(opened.starts[low]), int(opened.starts[high])
            upto = min(stop, end)
            mixed = sample_order(derive_seed("window", seed, number), epoch, end - begin, start - begin, upto - begin)
            within = np.searchsorted(opened.starts[low : high + 1], mixed + begin, side="right") - 1 + low
            parts.append(self.firsts[opened.blocks[within]] + mixed + begin - opened.starts[within])
            start = upto
        return np.concatenate(parts)

    def ahead(self, seed: int, epoch: int, block: int) -> list[int]:
        """The blocks of the window that `block` is in, and of the one after it, which may be the next epoch's first."""
        opened = self.opened(seed, epoch)
        number = int(np.flatnonzero(opened.blocks == block)[0]) // self.window
        found = opened.blocks[number * self.window : (number + 2) * self.window]
        if (number + 1) * self.window >= len(opened.blocks):
            found = np.concatenate([found, self.opened(seed, epoch + 1).blocks[: self.window]])
        return [int(b) for b in dict.fromkeys(found.tolist())]
