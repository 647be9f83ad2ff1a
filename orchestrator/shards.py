"""Logical shards: which samples, which seeds, which worker, and in which order their gradients are summed.

Everything here is a pure function of integers. The number of workers appears in `Placement` alone.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6  # Luby and Rackoff 1988: 4 rounds make a strong pseudo-random permutation; 2 to spare.
PIECE = 1024  # places whose samples are found in one go: numpy takes as long for the few of a microbatch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order (BLAKE2b, RFC 7693)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), element by element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_order(seed: int, epoch: int, size: int, start: int, stop: int) -> NDArray[np.int64]:
    """Places start..stop-1 of the epoch's order of `size` samples, each sample at exactly one place.

    A keyed Feistel network walked back into the range (Black and Rogaway 2002), so any slice costs the same,
    wherever it lies: resuming in the middle of an epoch reads nothing of what came before.

    Returns:
        int64 array of shape [stop - start], values in 0..size-1.
    """
    if stop - start > PIECE:
        return _permuted(seed, epoch, size, start, stop)
    pieces = [_piece(seed, epoch, size, number) for number in range(start // PIECE, -(-stop // PIECE))]
    found = np.concatenate([*pieces, np.empty(0, np.int64)])
    first = start // PIECE * PIECE
    return found[start - first : stop - first]


@functools.lru_cache(maxsize=64)
def _piece(seed: int, epoch: int, size: int, number: int) -> NDArray[np.int64]:
    return _permuted(seed, epoch, size, number * PIECE, min((number + 1) * PIECE, size))


def _permuted(seed: int, epoch: int, size: int, start: int, stop: int) -> NDArray[np.int64]:
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed("order", seed, epoch, r)) for r in range(FEISTEL_ROUNDS)]
    places = np.arange(start, stop, dtype=np.uint64)
    pending = np.ones(places.shape, dtype=bool)
    while pending.any():
        x = places[pending]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        x = (left << half) | right
        places[pending] = x
        pending[pending] = x >= size
    return places.astype(np.int64)


Order = Callable[[int, int, int, int, int], NDArray[np.int64]]  # such as `sample_order`


@dataclass(frozen=True)
class Schedule:
    """How an epoch of `size` samples falls into steps of `shards` microbatches.

    The declared rule: an epoch is cut into microbatches of batch_size / shards consecutive places of its order;
    step s of the epoch gets the next `shards` of them, so the last step may leave its last shards empty. A lone
    sample left at the end joins the microbatch before it (batch normalization cannot use a batch of one).
    """

    size: int
    batch_size: int
    shards: int
    order: Order = sample_order

    @property
    def microbatch_size(self) -> int:
        return self.batch_size // self.shards

    @property
    def microbatches(self) -> int:
        """Number of microbatches in an epoch."""
        full, rest = divmod(self.size, self.microbatch_size)
        lone = rest == 1 and self.microbatch_size > 1 and full > 0
        return full + (1 if rest and not lone else 0)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.microbatches // self.shards)

    def places(self, step: int, shard: int) -> tuple[int, int, int]:
        """(epoch, start, stop): the places in the epoch's order that `shard` of the run's `step` trains on."""
        epoch, within = divmod(step, self.steps_per_epoch)
        index = within * self.shards + shard
        if index >= self.microbatches:
            return epoch, self.size, self.size
        start = index * self.microbatch_size
        stop = self.size if index == self.microbatches - 1 else start + self.microbatch_size
        return epoch, start, stop

    def microbatches_in_step(self, step: int) -> int:
        """Those with samples: shards 0 to that many - 1."""
        return min(self.shards, self.microbatches - step % self.steps_per_epoch * self.shards)

    def samples_in_step(self, step: int) -> int:
        return self.places(step, self.microbatches_in_step(step) - 1)[2] - self.places(step, 0)[1]

    def samples_before(self, step: int) -> int:
        """Samples used by steps 0..step-1."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * self.size + min(self.size, within * self.batch_size)

    def indices(self, seed: int, step: int, shard: int) -> tuple[int, NDArray[np.int64]]:
        """(epoch, sample indices of shape [microbatch]) of one shard of one step."""
        epoch, start, stop = self.places(step, shard)
        return epoch, self.order(seed, epoch, self.size, start, stop)


@dataclass(frozen=True)
class Block:
    """An aligned block of the summation tree: shards start..start+size-1, size a power of two dividing start."""

    start: int
    size: int

    def is_left_sibling_of(self, other: "Block") -> bool:
        return self.size == other.size and self.start + self.size == other.start and self.start % (2 * self.size) == 0


def push_block(stack: list[Block], block: Block) -> int:
    """Push onto the pairwise stack; returns how many times the two topmost blocks have to be added."""
    stack.append(block)
    merges = 0
    while len(stack) > 1 and stack[-2].is_left_sibling_of(stack[-1]):
        right, left = stack.pop(), stack.pop()
        stack.append(Block(left.start, 2 * right.size))
        merges += 1
    return merges


def tree_blocks(start: int, stop: int) -> list[Block]:
    """The aligned blocks that a contiguous range of shards folds into, left to right."""
    stack: list[Block] = []
    for shard in range(start, stop):
        push_block(stack, Block(shard, 1))
    return stack


def live_blocks(own: range) -> int:
    """The most blocks that are alive at once while a worker goes through its range of shards."""
    stack: list[Block] = []
    most = 0
    for shard in own:
        most = max(most, len(stack) + 1)
        push_block(stack, Block(shard, 1))
    return most


@dataclass(frozen=True)
class Placement:
    """Which worker computes which shards: rank r owns shards bounds[r]..bounds[r+1]-1."""

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        assert all(low < high for low, high in pairwise(self.bounds)), f"a worker without shards: {self.bounds}"

    @property
    def shards(self) -> int:
        return self.bounds[-1]

    @property
    def workers(self) -> int:
        return len(self.bounds) - 1

    def range_of(self, rank: int) -> range:
        return range(self.bounds[rank], self.bounds[rank + 1])

    def blocks_of(self, rank: int) -> list[Block]:
        return tree_blocks(self.bounds[rank], self.bounds[rank + 1])

    def __iter__(self) -> Iterator[range]:
        return (self.range_of(rank) for rank in range(self.workers))


def even_placement(shards: int, workers: int) -> Placement:
    """Contiguous ranges whose lengths differ by at most one."""
    return Placement(tuple(rank * shards // workers for rank in range(workers + 1)))


def placement_from_counts(counts: Sequence[int]) -> Placement:
    """Contiguous ranges of the given lengths, in rank order."""
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return Placement(tuple(bounds))
