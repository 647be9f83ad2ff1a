"""Shares of shards: the best there are, found quickly, and moved only when that pays."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.balance import KNOWN_S, ShardPace, best_seconds, better, shares, speeds, step_seconds, stragglers

SPEEDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


def known(*shard_s: float) -> list[ShardPace]:
    return [ShardPace(seconds, KNOWN_S) for seconds in shard_s]


@given(speeds=SPEEDS, extra=st.integers(0, 200))
def test_all_shards_are_given_and_nobody_has_none(speeds, extra):
    counts = shares(len(speeds) + extra, speeds)
    assert sum(counts) == len(speeds) + extra
    assert min(counts) >= 1


@given(speeds=st.lists(st.floats(0.1, 10), min_size=2, max_size=4), extra=st.integers(0, 8))
def test_no_other_shares_are_done_earlier(speeds, extra):
    """Against every way to deal the shards out."""
    total = len(speeds) + extra
    shard_s = [1 / speed for speed in speeds]
    ways = itertools.product(range(1, total + 1), repeat=len(speeds))
    best = min(step_seconds(way, shard_s) for way in ways if sum(way) == total)
    assert step_seconds(shares(total, speeds), shard_s) == pytest.approx(best)


@given(speeds=SPEEDS, extra=st.integers(0, 200), factor=st.sampled_from([0.001, 0.5, 4.0, 1024.0]))
def test_only_ratios_of_speeds_matter(speeds, extra, factor):
    shard_s = [1 / speed for speed in speeds]
    total = len(speeds) + extra
    scaled = shares(total, [speed * factor for speed in speeds])
    assert step_seconds(scaled, shard_s) == pytest.approx(step_seconds(shares(total, speeds), shard_s))


def test_half_the_speed_gets_half_the_shards():
    assert shares(12, [1.0, 0.5]) == [8, 4]
    assert shares(64, [2.0, 1.0, 1.0]) == [32, 16, 16]
    assert shares(4, [1.0, 1e-9]) == [3, 1], "never none"


def test_equal_speeds_get_equal_shares():
    for workers in (1, 2, 4, 8):
        assert shares(8, [0.3] * workers) == [8 // workers] * workers


def test_a_pace_follows_the_machine():
    pace = ShardPace()
    for _ in range(100):
        pace.measured(4, 0.4)
    assert pace.shard_s == pytest.approx(0.1)
    assert pace.known_s == pytest.approx(40)
    for _ in range(20):
        pace.measured(2, 0.4)
    assert 0.18 < pace.shard_s <= 0.2, "twice as slow, known within two time constants"
    pace.measured(0, 0.0)
    assert 0.18 < pace.shard_s <= 0.2


@pytest.mark.parametrize(
    ("counts", "shard_s", "step_s", "left", "cost_s", "moves"),
    [
        ([8, 8], (0.1, 0.2), 1.7, 1000, 0.5, True),
        ([8, 8], (0.1, 0.2), 1.7, 2, 0.5, False),  # the run is about over
        ([8, 8], (0.1, 0.2), 1.7, 1000, 30.0, False),  # moving is dear
        ([8, 8], (0.1, 0.103), 0.9, 1000, 0.5, False),  # noise
        ([8, 8], (0.1, 0.2), 40.0, 1000, 0.5, False),  # the step's time is spent elsewhere
        ([11, 5], (0.1, 0.2), 1.2, 1000, 0.5, False),  # as good as it gets
    ],
)
def test_shards_move_only_when_that_pays(counts, shard_s, step_s, left, cost_s, moves):
    found = better(counts, known(*shard_s), step_s, left, cost_s)
    assert (found is not None) == moves
    if found is not None:
        assert step_seconds(found.counts, shard_s) < step_seconds(counts, shard_s)


def test_nothing_moves_before_all_are_known():
    assert better([8, 8], [ShardPace(0.1, KNOWN_S), ShardPace(0.2, KNOWN_S / 2)], 1.7, 1000, 0.1) is None
    assert better([16], known(0.1), 1.7, 1000, 0.1) is None


@given(
    paces=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6),
    step_factor=st.floats(1.0, 3.0),
    cost_s=st.floats(0.01, 2.0),
)
def test_after_a_move_nothing_moves_again(paces, step_factor, cost_s):
    """With the same speeds: no going back and forth."""
    even = shares(32, [1.0] * len(paces))
    step_s = step_seconds(even, paces) * step_factor
    found = better(even, known(*paces), step_s, 10_000, cost_s)
    if found is not None:
        later_s = step_s * (1 - found.gain)
        assert better(found.counts, known(*paces), later_s, 10_000, cost_s) is None


@given(st.integers(1, 60), st.lists(st.floats(0.01, 10.0), min_size=1, max_size=6))
def test_the_best_time_is_that_of_the_best_shares(more, shard_s):
    total = len(shard_s) + more
    best = step_seconds(shares(total, [1 / s for s in shard_s]), shard_s)
    assert best_seconds(total, np.asarray(shard_s)) == pytest.approx(best, rel=1e-6)


def test_who_is_not_known_is_taken_for_what_is_declared():
    assert speeds([ShardPace(), ShardPace()], [1.0, 2.0]) == [1.0, 2.0]
    assert speeds([ShardPace(0.1, KNOWN_S), ShardPace()], [1.0, 2.0]) == pytest.approx([10.0, 20.0])


def test_who_declares_nothing_is_taken_for_a_usual_one():
    assert speeds([ShardPace()] * 4, [0.0, 312.0, 312.0, 989.0]) == [312.0, 312.0, 312.0, 989.0]
    assert speeds([ShardPace()] * 2, [0.0, 0.0]) == [1.0, 1.0]


def test_a_straggler_is_named_with_its_cost():
    assert stragglers(16, known(0.1, 0.11, 0.12)) == []
    (slow,) = stragglers(16, known(0.1, 0.1, 0.3))
    assert (slow.rank, slow.worse_than_none) == (2, False)
    assert slow.slower == pytest.approx(3)
    assert 0.1 < slow.cost < 0.3
    (dead_weight,) = stragglers(16, known(0.1, 0.1, 2.0))
    assert dead_weight.worse_than_none, "its one shard takes longer than the others need for all"


@pytest.mark.timeout(60)
def test_ten_thousand_workers_can_be_planned():
    counts = shares(65_536, [1.0 + (i * 7919 % 1000) / 1000 for i in range(10_000)])
    assert sum(counts) == 65_536


@pytest.mark.parametrize("wait_s", [3.0, 10.0, 40.0])
def test_one_long_wait_makes_no_straggler(wait_s):
    """For storage, say: the pace is hardly another one, and what is slow for good is believed soon."""
    paces = [ShardPace(), ShardPace()]
    for _ in range(100):
        for pace in paces:
            pace.measured(4, 0.2)
    paces[0].measured(4, wait_s)
    assert paces[0].shard_s < 1.35 * paces[1].shard_s
    for _ in range(10):
        for pace in paces:
            pace.measured(4, 0.2)
    assert better([4, 4], paces, 0.25, 10_000, 0.5) is None
    assert not stragglers(8, paces)
    for _ in range(8):
        paces[0].measured(4, 2.0)
    assert paces[0].shard_s > 0.9 * 0.5


def test_who_was_slow_for_a_while_is_soon_believed_to_be_quick_again():
    """Though it has few shards by then, and so computes for a small part of the time."""
    pace = ShardPace()
    for _ in range(100):
        pace.measured(4, 0.02)
    for _ in range(40):
        pace.measured(4, 0.32, 0.33)
    assert pace.shard_s > 0.06
    for _ in range(15 * 25):  # fifteen seconds
        pace.measured(1, 0.005, 0.04)
    assert pace.shard_s < 1.5 * 0.005
