"""Which worker holds which part of the model: replica groups of neighbouring ranks.

A replica group holds the model once, in parts; its workers train together on the group's logical shards. Workers of
different groups with the same part hold the same: gradients are summed among them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.shards import Placement, even_placement
from orchestrator.values import Parallel


@dataclass(frozen=True)
class Layout:
    """`workers` in groups of `size`; the size divides the workers."""

    workers: int
    size: int

    def __post_init__(self) -> None:
        assert self.size >= 1
        assert self.workers % self.size == 0, f"{self.workers} workers do not make groups of {self.size}"

    @property
    def groups(self) -> int:
        return self.workers // self.size

    def group_of(self, rank: int) -> int:
        """The replica group of a worker."""
        return rank // self.size

    def part_of(self, rank: int) -> int:
        """The part of the model that a worker holds, 0..size-1."""
        return rank % self.size

    def members(self, group: int) -> list[int]:
        """Ranks of a replica group, by part."""
        return list(range(group * self.size, (group + 1) * self.size))

    def holders(self, part: int) -> list[int]:
        """Ranks that hold a part, by replica group."""
        return list(range(part, self.workers, self.size))


def layout_of(parallel: Parallel, workers: int) -> Layout:
    """The layout of exactly so many workers; with fsdp they are one group."""
    return Layout(workers, parallel.size or workers)


def usable(parallel: Parallel, workers: int, shards: int) -> int:
    """How many of `workers` make whole groups of which each has a shard; 0: not one group."""
    if not parallel.size:
        return min(workers, shards)
    unit = parallel.size if parallel.kind == "hsdp" else 1  # shards that a group takes at a time
    return min(workers // parallel.size, shards // unit) * parallel.size


def units_of(parallel: Parallel, layout: Layout, shards: int) -> tuple[int, int]:
    """(pieces that a step is dealt out in, shards of each), the first a power of two.

    Workers of fsdp and hsdp train side by side, each on a shard of its own: a group takes as many at a time as it has
    workers. With a power of two of them that is a block of the summation tree.
    """
    if parallel.kind not in ("fsdp", "hsdp"):
        return shards, 1
    rounds = -(-shards // layout.size)
    return 1 << (rounds - 1).bit_length(), layout.size


def group_placement(parallel: Parallel, layout: Layout, shards: int) -> Placement:
    """Shards of each replica group, as even as can be."""
    each = layout.size if parallel.kind == "hsdp" else 1
    return Placement(tuple(bound * each for bound in even_placement(shards // each, layout.groups).bounds))


def unit_placement(parallel: Parallel, layout: Layout, placement: Placement) -> Placement:
    """The same in units_of."""
    units, each = units_of(parallel, layout, placement.shards)
    return Placement((*(bound // each for bound in placement.bounds[:-1]), units))


def room_for_whole(told: Sequence[tuple[str, bool, int, int]], layout: Layout) -> bool:
    """Whether the hosts have room for the whole state, once for each worker that would take it along.

    Half of what is free is left to what else happens there.

    Args:
        told: by rank: the host, whether the worker would take it along, bytes of its part, free bytes of its host.
    """
    whole = sum(part for _, _, part, _ in told[: layout.size])
    carriers = Counter(host for host, carries, _, _ in told if carries)
    return all(2 * whole * carriers[host] <= free for host, _, _, free in told)
