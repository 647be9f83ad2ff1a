"""The order of an epoch over files: every sample once, any slice alone, files near each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.blocks import BlockOrder
from orchestrator.shards import Schedule

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def whole(order: BlockOrder, seed: int, epoch: int) -> np.ndarray:
    size = int(order.firsts[-1])
    return order(seed, epoch, size, 0, size)


@given(SIZES, st.integers(1, 14), st.integers(0, 5), st.integers(0, 3))
def test_every_sample_is_at_one_place(sizes, window, seed, epoch):
    found = whole(BlockOrder(sizes, window), seed, epoch)
    assert sorted(found) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 14), st.data())
def test_any_slice_is_that_of_the_whole(sizes, window, data):
    order, size = BlockOrder(sizes, window), sum(sizes)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    assert list(BlockOrder(sizes, window)(1, 2, size, start, stop)) == list(whole(order, 1, 2)[start:stop])


@given(SIZES, st.integers(1, 4))
def test_a_window_is_done_before_the_next_one_begins(sizes, window):
    """So no more than two windows of files are needed at a time."""
    order = BlockOrder(sizes, window)
    blocks = np.searchsorted(order.firsts, whole(order, 0, 0), side="right") - 1
    seen = [frozenset(order.opened(0, 0).blocks[n : n + window]) for n in range(0, len(sizes), window)]
    at = 0
    for some in seen:
        count = sum(sizes[b] for b in some)
        assert set(blocks[at : at + count]) == some
        at += count


@given(SIZES, st.integers(1, 4), st.data())
def test_what_is_fetched_ahead_is_this_window_and_the_next(sizes, window, data):
    order = BlockOrder(sizes, window)
    place = data.draw(st.integers(0, len(sizes) - 1))
    opened = list(order.opened(3, 1).blocks)
    first = place // window * window
    wanted = opened[first : first + 2 * window]
    if first + window >= len(sizes):  # an epoch's last window is followed by the first one of the next epoch
        wanted += [b for b in order.opened(3, 2).blocks[:window] if b not in wanted]
    assert order.ahead(3, 1, int(opened[place])) == wanted


def test_epochs_and_seeds_differ():
    order = BlockOrder([10] * 8, 2)
    orders = {tuple(whole(order, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_window_s_samples_are_mixed():
    """Not file after file: among the first half of a window's samples are about as many of each of its files."""
    order = BlockOrder([1000] * 8, 4)
    blocks = whole(order, 0, 0)[:2000] // 1000
    counts = np.unique(blocks, return_counts=True)[1]
    assert len(counts) == 4
    assert counts.min() > 430


def test_a_schedule_takes_its_order():
    order = BlockOrder([5, 9, 2], 2)
    schedule = Schedule(16, 4, 2, order)
    taken = [i for step in range(4) for shard in range(2) for i in schedule.indices(7, step, shard)[1]]
    assert taken == list(whole(order, 7, 0))


@pytest.mark.parametrize("start", [0, 5_000_000, 9_999_990])
def test_ten_million_samples_cost_the_same_anywhere(start):
    order = BlockOrder([500] * 20_000, 16)
    found = order(0, 3, 10_000_000, start, start + 10)
    assert len(set(found)) == 10
