"""Microbatches that are handed out: each counted once, none begun too early, whoever comes and goes."""

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.handout import Counted, Handout, Unit, ranges

STEPS, SHARDS = 5, 4


def width(step: int) -> int:
    return SHARDS if step % 3 != 2 else 2  # the last step of an epoch may be short


EVERY = [Unit(step, shard) for step in range(STEPS) for shard in range(width(step))]


class Workers(RuleBasedStateMachine):
    """Workers that ask, finish, finish twice, die and come back, in any order."""

    @initialize(bound=st.sampled_from([0, 1, 2, math.inf]), done=st.sets(st.sampled_from(EVERY), max_size=5))
    def begin(self, bound, done):
        finished = Counted(width)
        for unit in done:
            finished.add(unit)
        self.bound, self.before, self.times = bound, done, dict.fromkeys(EVERY, 0)
        self.handout = Handout(finished, STEPS, bound)
        self.held = {}
        self.lost = []

    @rule(worker=st.sampled_from("abc"))
    def take(self, worker):
        unit = self.handout.take(worker)
        if unit is None:
            # Only what others hold, or the bound, keeps anyone waiting.
            held = set().union(*self.held.values()) if self.held else set()
            for other in EVERY:
                free = other not in held and not self.times[other] and other not in self.before
                assert not free or other.step > self.handout.oldest + self.bound
            return
        assert unit.step <= self.handout.oldest + self.bound
        assert unit not in self.before
        assert not self.times[unit], "handed out after it was finished"
        assert not any(unit in held for held in self.held.values()), "two workers hold it"
        self.held.setdefault(worker, set()).add(unit)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def finish(self, data):
        worker = data.draw(st.sampled_from(sorted(w for w, held in self.held.items() if held)))
        unit = data.draw(st.sampled_from(sorted(self.held[worker])))
        self.held[worker].discard(unit)
        self.times[unit] += self.handout.finish(worker, unit)
        assert not self.handout.finish(worker, unit)

    @rule(worker=st.sampled_from("abc"))
    def die(self, worker):
        held = self.held.pop(worker, set())
        assert set(self.handout.take_back(worker)) == held
        self.lost += sorted(held)

    @precondition(lambda self: self.lost)
    @rule(data=st.data())
    def what_a_lost_worker_had_pushed_is_found_later(self, data):
        unit = data.draw(st.sampled_from(self.lost))
        if not any(unit in held for held in self.held.values()):
            self.times[unit] += self.handout.finish("gone", unit)

    @invariant()
    def the_oldest_step_is_right(self):
        if hasattr(self, "handout"):
            missing = [unit for unit in EVERY if not self.times[unit] and unit not in self.before]
            assert self.handout.oldest == (min(missing).step if missing else STEPS)
            assert max(self.times.values()) <= 1

    def teardown(self):
        """Whatever happened, one worker that stays finishes the run, and every unit is counted once."""
        if not hasattr(self, "handout"):
            return
        for worker in list(self.held):
            self.handout.take_back(worker)
        begun = {unit.step for unit in EVERY if self.times[unit] or unit in self.before}
        while (unit := self.handout.take("last", begin=False)) is not None:
            self.times[unit] += self.handout.finish("last", unit)
        assert self.handout.between_steps, "a stop has nothing to wait for"
        done = {unit for unit in EVERY if self.times[unit] or unit in self.before}
        assert all(unit in done for unit in EVERY if unit.step in begun)
        while (unit := self.handout.take("last")) is not None:
            self.times[unit] += self.handout.finish("last", unit)
        assert self.handout.complete
        assert {unit for unit, times in self.times.items() if times} == set(EVERY) - self.before
        assert set(self.times.values()) <= {0, 1}


TestWorkers = Workers.TestCase


def test_with_bound_0_steps_are_taken_one_after_the_other():
    handout = Handout(Counted(width), STEPS, 0)
    first = [handout.take("a") for _ in range(SHARDS)]
    assert first == [Unit(0, shard) for shard in range(SHARDS)]
    assert handout.take("b") is None
    for unit in first:
        handout.finish("a", unit)
    assert handout.take("b") == Unit(1, 0)


def test_what_is_returned_comes_before_anything_new():
    handout = Handout(Counted(width), STEPS, math.inf)
    for _ in range(6):
        handout.take("a")
    handout.take_back("a")
    assert [handout.take("b") for _ in range(7)] == EVERY[:7]


@given(units=st.lists(st.sampled_from(EVERY)))
def test_a_set_survives_as_numbers(units):
    counted = Counted(width)
    for unit in units:
        counted.add(unit)
    again = Counted.of(width, counted.flat())
    assert (again.step, again.beyond) == (counted.step, counted.beyond)
    assert [unit in again for unit in EVERY] == [unit in units for unit in EVERY]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), parts=st.integers(1, 5))
def test_ranges_cover_all_and_are_as_even_as_can_be(sizes, parts):
    found = ranges(sizes, parts)
    assert [i for part in found for i in part] == list(range(len(sizes)))
    assert len(found) == min(parts, len(sizes))
    assert all(found)

    def best(first: int, left: int) -> int:
        if left == 1:
            return sum(sizes[first:])
        cuts = range(first + 1, len(sizes) - left + 2)
        return min(max(sum(sizes[first:cut]), best(cut, left - 1)) for cut in cuts)

    assert max(sum(sizes[i] for i in part) for part in found) == best(0, len(found))


def test_one_huge_parameter():
    assert ranges([1, 1, 100, 1, 1], 2) in ([range(2), range(2, 5)], [range(3), range(3, 5)])
    assert ranges([5], 3) == [range(1)]


def test_before_a_stop_no_step_is_begun():
    handout = Handout(Counted(width), STEPS, math.inf)
    assert handout.take("a", begin=False) is None
    assert handout.between_steps
    first = handout.take("a")
    rest = [handout.take("b", begin=False) for _ in range(SHARDS)]
    assert rest == [*(Unit(0, shard) for shard in range(1, SHARDS)), None]
    for unit in (first, *rest[:-1]):
        assert not handout.between_steps
        handout.finish("a" if unit == first else "b", unit)
    assert handout.between_steps
    assert handout.take("a", begin=False) is None
