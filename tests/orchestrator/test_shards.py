"""Sample order, the cut of an epoch into microbatches, placements and the summation tree."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.shards import (
    Block,
    Placement,
    Schedule,
    derive_seed,
    even_placement,
    placement_from_counts,
    push_block,
    sample_order,
    tree_blocks,
)

SEEDS = st.integers(0, 2**63 - 1)
POWERS = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256])


@st.composite
def placements(draw, shards: int) -> Placement:
    """Any contiguous division in which every worker has a shard."""
    cuts = draw(st.sets(st.integers(1, max(1, shards - 1)), max_size=min(shards - 1, 12)))
    return Placement((0, *sorted(cuts), shards))


@st.composite
def schedules(draw) -> Schedule:
    shards = draw(st.sampled_from([1, 2, 4, 8]))
    microbatch = draw(st.integers(1, 6))
    return Schedule(draw(st.integers(1, 300)), microbatch * shards, shards)


@given(st.integers(1, 3000), SEEDS, st.integers(0, 1000))
def test_an_order_has_every_sample_once(size, seed, epoch):
    order = sample_order(seed, epoch, size, 0, size)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@given(st.integers(1, 2000), SEEDS, st.integers(0, 50), st.data())
def test_a_slice_is_a_slice_of_the_whole(size, seed, epoch, data):
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = sample_order(seed, epoch, size, 0, size)
    assert np.array_equal(sample_order(seed, epoch, size, start, stop), whole[start:stop])


@given(st.integers(1, 2**40), SEEDS)
def test_a_slice_of_a_huge_order_is_cheap_and_in_range(size, seed):
    found = sample_order(seed, 0, size, max(0, size - 50), size)
    assert len(set(found.tolist())) == min(50, size)
    assert found.min() >= 0
    assert found.max() < size


@given(st.integers(200, 3000), SEEDS, st.integers(0, 1000))
def test_another_seed_or_epoch_is_another_order(size, seed, epoch):
    """Two random orders of n samples agree at one place on average; at 12 or more with probability 1e-9."""
    orders = [sample_order(*key, size, 0, size) for key in ((seed, epoch), (seed + 1, epoch), (seed, epoch + 1))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() < 12


def test_an_order_is_shuffled():
    """Neither runs of neighbours nor a bias of places: the mean sample at each tenth is the mean of all."""
    order = sample_order(0, 0, 100_000, 0, 100_000)
    assert (abs(np.diff(order)) == 1).sum() < 20  # 2 are expected
    tenths = order.reshape(10, -1).mean(1)
    assert abs(tenths - 49_999.5).max() < 5 * 100_000 / math.sqrt(12 * 10_000)


def test_an_order_is_the_one_it_always_was():
    """A change of these numbers would break the resumption of every run: then raise the checkpoint's format."""
    assert sample_order(1, 2, 10, 0, 10).tolist() == GOLDEN_ORDER
    assert derive_seed("step", 3, 4, 5) == GOLDEN_SEED


@given(st.lists(st.integers(0, 10**6) | st.text("abc/", max_size=3), min_size=1, max_size=4))
def test_seeds_fit_torch_and_numpy(parts):
    assert 0 <= derive_seed(*parts) < 2**63
    assert derive_seed(*parts) == derive_seed(*parts)
    assert derive_seed(*parts) != derive_seed(*parts, 0)


@given(schedules(), SEEDS, st.data())
def test_every_sample_is_used_once_an_epoch_whatever_the_placements(schedule, seed, data):
    """The placement changes between any two steps; the workers' shards together are each epoch's samples."""
    for epoch in range(2):
        used: list[int] = []
        for step in range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch):
            placement = data.draw(placements(schedule.shards))
            for own in placement:
                for shard in own:
                    found, indices = schedule.indices(seed, step, shard)
                    assert found == epoch
                    used += indices.tolist()
        assert sorted(used) == list(range(schedule.size))


@given(schedules())
def test_microbatches_partition_the_epoch(schedule):
    reached = 0
    for step in range(schedule.steps_per_epoch):
        assert schedule.samples_before(step) == reached
        assert schedule.samples_in_step(step) > 0
        sizes = []
        for shard in range(schedule.shards):
            epoch, start, stop = schedule.places(step, shard)
            assert epoch == 0
            assert start == min(reached, schedule.size)
            sizes.append(stop - start)
            reached = stop
        assert sum(sizes) == schedule.samples_in_step(step)
        assert max(sizes) <= schedule.microbatch_size + 1
        assert sizes == sorted(sizes, reverse=True) or max(sizes) > schedule.microbatch_size
    assert reached == schedule.size


@given(schedules())
def test_no_microbatch_is_a_lone_sample_unless_it_must_be(schedule):
    sizes = [
        stop - start
        for step in range(schedule.steps_per_epoch)
        for shard in range(schedule.shards)
        for _, start, stop in [schedule.places(step, shard)]
    ]
    if schedule.microbatch_size > 1 and schedule.size > 1:
        assert 1 not in sizes


@given(schedules(), st.integers(0, 100))
def test_samples_before_is_the_sum_of_the_steps_before(schedule, step):
    assert schedule.samples_before(step) == sum(schedule.samples_in_step(s) for s in range(step))


@pytest.mark.parametrize(
    ("size", "steps", "last"),
    [(16, 2, 8), (17, 2, 9), (18, 3, 2), (9, 1, 9), (1, 1, 1), (8, 1, 8), (2, 1, 2)],
)
def test_the_declared_rule_for_the_end_of_an_epoch(size, steps, last):
    schedule = Schedule(size, 8, 4)
    assert schedule.steps_per_epoch == steps
    assert schedule.samples_in_step(steps - 1) == last


def fold(placement: Placement, values: list[object]) -> tuple[object, int]:
    """The tree sum with pairs (a, b) for a + b, as workers and then their blocks do it; most blocks alive."""
    alive = 0
    blocks: list[Block] = []
    sums: list[object] = []
    for own in placement:
        stack: list[Block] = []
        rows: list[object] = []
        for shard in own:
            rows.append(values[shard])
            alive = max(alive, len(rows))
            for _ in range(push_block(stack, Block(shard, 1))):
                right = rows.pop()
                rows[-1] = (rows[-1], right)
        assert len(stack) == len(rows)
        blocks += stack
        sums += rows
    stack, rows = [], []
    for block, value in zip(blocks, sums, strict=True):
        rows.append(value)
        for _ in range(push_block(stack, block)):
            right = rows.pop()
            rows[-1] = (rows[-1], right)
    assert stack == [Block(0, placement.shards)]
    (whole,) = rows
    return whole, alive


def balanced(values: list[object]) -> object:
    half = len(values) // 2
    return values[0] if len(values) == 1 else (balanced(values[:half]), balanced(values[half:]))


@given(POWERS, st.data())
def test_every_placement_folds_to_the_same_expression(shards, data):
    names: list[object] = [f"g{v}" for v in range(shards)]
    placement = data.draw(placements(shards))
    whole, alive = fold(placement, names)
    assert whole == balanced(names)
    depth = shards.bit_length() - 1
    assert alive <= max(depth + 1, 2 * depth - 1)


@given(POWERS, st.data())
def test_aligned_ranges_need_one_block_a_level_and_one_more(shards, data):
    """With 1, 2, 4, ... workers. A range that starts at an odd shard needs up to 2 log2(shards) - 1."""
    workers = 1 << data.draw(st.integers(0, shards.bit_length() - 1))
    _, alive = fold(even_placement(shards, workers), [""] * shards)
    assert alive == (shards // workers).bit_length()  # log2 of the range + 1
    assert fold(Placement((0, 1, 64)), [""] * 64)[1] == 11


@given(POWERS, st.data())
def test_blocks_are_aligned_and_cover_their_range(shards, data):
    start = data.draw(st.integers(0, shards - 1))
    stop = data.draw(st.integers(start + 1, shards))
    blocks = tree_blocks(start, stop)
    assert [v for b in blocks for v in range(b.start, b.start + b.size)] == list(range(start, stop))
    assert all(b.size & (b.size - 1) == 0 and b.start % b.size == 0 for b in blocks)
    assert len(blocks) <= max(1, 2 * (shards.bit_length() - 1))


@given(st.integers(0, 64), st.integers(0, 6), st.integers(0, 64), st.integers(0, 6))
def test_siblings_are_the_halves_of_an_aligned_block(a, size_a, b, size_b):
    left, right = Block(a << size_a, 1 << size_a), Block(b << size_b, 1 << size_b)
    parents = size_a == size_b and a % 2 == 0 and b == a + 1
    assert left.is_left_sibling_of(right) == parents


@given(st.integers(1, 256), st.integers(1, 256))
def test_even_placements_differ_by_one_at_most(shards, workers):
    assume(workers <= shards)
    lengths = [len(own) for own in even_placement(shards, workers)]
    assert sum(lengths) == shards
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_placements_from_counts(counts):
    placement = placement_from_counts(counts)
    assert [len(own) for own in placement] == counts
    assert placement.workers == len(counts)
    assert [v for own in placement for v in own] == list(range(placement.shards))
    assert [placement.range_of(r) for r in range(len(counts))] == list(placement)


GOLDEN_ORDER = [5, 8, 1, 0, 7, 3, 4, 2, 9, 6]
GOLDEN_SEED = 752042260404513266


@given(size=st.integers(1, 200), shards=st.sampled_from([1, 2, 4, 8]), each=st.integers(1, 9), step=st.integers(0, 60))
def test_microbatches_of_a_step(size, shards, each, step):
    schedule = Schedule(size, shards * each, shards)
    places = [schedule.places(step, shard) for shard in range(shards)]
    assert schedule.microbatches_in_step(step) == sum(stop > start for _, start, stop in places)
