"""Who is seated, when, and who is given up: the decisions of recovery.py, one by one."""

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recovery import (
    FIRST_STEP_S,
    FLAP_WINDOW_S,
    FLAPS,
    GATHER_S,
    LEFT_OUT_S,
    SETTLE_S,
    SILENCE_FLOOR_S,
    STALL_STEPS,
    START_GRACE_S,
    Member,
    Roster,
    silence_limit_s,
    stall_limit_s,
)
from orchestrator.suspicion import SILENT_DEATHS, Suspicion


def member(name: str, step: int = -1, rank: int = -1, node: str = "n0") -> Member:
    return Member(name, node, 1, "cpu", step, rank, ("127.0.0.1", 1))


def roster(minimum: int = 1, maximum: int = 4, expected: int | None = None) -> Roster:
    return Roster(minimum, maximum, maximum if expected is None else expected)


def seat(given: Roster, *members: Member, now: float = 0.0) -> list[str]:
    """The ids of the generation that forms when these ask for a seat."""
    for m in members:
        given.join(m, now)
    return [m.id for m in given.form(now + START_GRACE_S) or []]


def again(given: Roster, step: int, now: float) -> list[str]:
    """All seated members come back with `step` steps, those leave who must; the ids of the next generation."""
    for rank, m in enumerate(sorted(given.seated.values(), key=lambda m: (m.rank < 0, m.rank))):
        given.join(dataclasses.replace(m, step=step, rank=rank), now)
    for m in [m for m in given.ready.values() if given.must_leave(m)]:
        del given.ready[m.id]
    return [m.id for m in given.form(now) or []]


def test_the_first_generation_waits_for_the_expected_workers_but_not_for_ever():
    waiting = roster(1, 3)
    waiting.join(member("a"), 100.0)
    assert waiting.form(100.0) is None
    assert waiting.missing() == 2
    waiting.join(member("b"), 120.0)
    assert waiting.form(120.0 + START_GRACE_S - 0.1) is None, "the clock starts with the last joiner"
    assert [m.id for m in waiting.form(120.0 + START_GRACE_S) or []] == ["a", "b"]
    assert waiting.missing() == 0
    complete = roster(1, 3)
    for name in "abc":
        complete.join(member(name), 5.0)
    assert complete.form(5.0), "with all there nobody waits"


def test_training_waits_for_the_minimum_for_ever():
    waiting = roster(2, 3)
    assert seat(waiting, member("a", step=7)) == []
    assert waiting.form(1e9) is None
    assert seat(waiting, member("b"), now=1e9) == ["a", "b"]
    waiting.lose("a")
    assert waiting.missing() == 1


def test_a_generation_that_has_state_does_not_wait_for_the_expected():
    given_up = roster(1, 4)
    given_up.join(member("a", step=0), 0.0)
    assert [m.id for m in given_up.form(0.0) or []] == ["a"]


def test_ranks_begin_with_the_newest_state_and_stay_as_they_were():
    members = [member("new"), member("c", 8, 2), member("old", 7, 0), member("b", 8, 1), member("d", 8, 3)]
    for order in itertools.permutations(members):
        assert seat(roster(1, 5), *order) == ["b", "c", "d", "old", "new"]
    assert seat(roster(1, 2), *members) == ["b", "c"]


def test_a_member_that_comes_back_or_is_lost_ends_the_generation():
    for end in ("join", "lose"):
        generation = roster(1, 3)
        seat(generation, member("a"), member("b"))
        assert generation.training
        assert generation.generation == 1
        generation.join(member("c"), 50.0)
        assert generation.training, "a joiner ends nothing"
        if end == "join":
            generation.join(member("a", 5, 0), 51.0)
        else:
            assert generation.lose("a") is not None
        assert not generation.training
        assert generation.form(99.0) is None, "b has not come back"
        assert not generation.wants_pause(99.0)
        generation.join(member("b", 5, 1), 99.0)
        formed = [m.id for m in generation.form(99.0) or []]
        assert formed == (["a", "b", "c"] if end == "join" else ["b", "c"])
        assert generation.generation == 2
    assert generation.lose("nobody") is None


def test_a_joiner_is_seated_at_a_pause_once_others_that_come_with_it_are_there():
    growing = roster(1, 3)
    seat(growing, member("a"))
    growing.join(member("b"), 50.0)
    assert not growing.wants_pause(50.0 + SETTLE_S - 0.1)
    growing.join(member("c"), 50.2)
    assert not growing.wants_pause(50.2 + SETTLE_S - 0.1)
    assert growing.wants_pause(50.2 + SETTLE_S + 0.01)
    assert again(growing, 9, 51.0) == ["a", "b", "c"]
    growing.join(member("d"), 52.0)
    assert not growing.wants_pause(60.0), "there is no room"


def test_members_of_a_draining_node_leave_when_the_others_suffice():
    shrinking = roster(1, 3)
    seat(shrinking, member("a", node="n1"), member("b"))
    assert not shrinking.wants_pause(40.0)
    shrinking.draining = frozenset({"n1"})
    assert shrinking.wants_pause(40.0)
    assert again(shrinking, 9, 41.0) == ["b"]
    assert not shrinking.ready


def test_a_draining_node_is_kept_while_nothing_replaces_it():
    """With too few others; with others that are on draining nodes too; and with the only state."""
    for minimum, members in (
        (2, [member("a", node="n1"), member("b")]),
        (1, [member("a", node="n1"), member("b", node="n2")]),
    ):
        kept = roster(minimum, 3)
        seat(kept, *members)
        kept.draining = frozenset({"n1", "n2"})
        assert not kept.wants_pause(40.0)
        assert again(kept, 9, 41.0) == ["a", "b"], "another's loss ends a generation too"
    alone = roster(1, 2)
    seat(alone, member("a", node="n1"))
    alone.draining = frozenset({"n1"})
    alone.join(member("b"), 50.0)
    assert not alone.wants_pause(50.0 + SETTLE_S - 0.1)
    assert alone.wants_pause(50.0 + SETTLE_S + 0.1)
    assert not alone.must_leave(member("a", 9, 0, "n1"))
    assert again(alone, 9, 51.0) == ["a", "b"], "the joiner receives the state first"
    assert alone.wants_pause(52.0)
    assert again(alone, 10, 53.0) == ["b"]
    assert not alone.must_leave(member("b", 10, 0)), "its node stays"


def test_a_draining_member_with_a_newer_step_hands_it_over_first():
    ahead = roster(1, 2)
    seat(ahead, member("a", node="n1"), member("b"))
    ahead.draining = frozenset({"n1"})
    ahead.join(member("a", 9, 0, "n1"), 40.0)
    ahead.join(member("b", 8, 1), 40.0)
    assert not ahead.must_leave(ahead.ready["a"])
    assert [m.id for m in ahead.form(40.0) or []] == ["a", "b"]


def test_a_replacement_gets_a_seat_though_all_are_taken_by_the_leaving():
    full = roster(1, 2)
    seat(full, member("a", node="n1"), member("b", node="n1"))
    full.draining = frozenset({"n1"})
    full.join(member("c"), 50.0)
    assert full.wants_pause(51.0)
    assert "c" in again(full, 9, 51.0)


def test_a_node_that_keeps_losing_workers_is_left_out_each_time_for_longer():
    flapping = roster(1, 2)
    seat(flapping, member("a", node="n1"))
    now = 1000.0
    for _ in range(FLAPS - 1):
        flapping.lost_on("n0", now)
    flapping.join(member("b"), now)
    assert flapping.wants_pause(now + 1)
    for factor in (1, 2, 4, 8, 16, 16):
        flapping.lost_on("n0", now)
        assert not flapping.wants_pause(now + LEFT_OUT_S * factor - 1)
        assert flapping.wants_pause(now + LEFT_OUT_S * factor + 1)
    later = now + 16 * LEFT_OUT_S + FLAP_WINDOW_S
    flapping.lost_on("n0", later)
    assert flapping.wants_pause(later + 1), "what was long ago is forgotten"


def test_a_machine_that_fails_whenever_it_is_back_is_left_out_for_longer_each_time():
    flapping = Roster(1, 3, 3)
    now, waits = 100.0, []
    for _ in range(FLAPS + 5):
        flapping.lost_on("n0", now)
        waits.append(max(0.0, flapping.left_out.get("n0", 0.0) - now))
        now = max(now, flapping.left_out.get("n0", 0.0)) + 10
    assert waits == [0.0] * (FLAPS - 1) + [LEFT_OUT_S * factor for factor in (1, 2, 4, 8, 16, 16)]


def test_a_machine_left_out_is_used_when_the_number_is_short_or_others_train_on_it():
    joiner = member("b", node="n1")
    for minimum, first in ((2, member("a", 5, 0)), (1, member("a", 5, 0, "n1")), (1, member("a", 0, -1, "n1"))):
        needed = roster(minimum, 2)
        needed.left_out["n1"] = 1e9
        assert seat(needed, first, joiner) == ["a", "b"]
    for a in (member("a", 5, 0), member("a")):
        enough = roster(1, 2)
        enough.left_out["n1"] = 1e9
        assert seat(enough, a, joiner) == ["a"]
        assert not enough.wants_pause(1e9 - 1)
        assert enough.wants_pause(1e9 + 1)


def test_a_machine_is_known_by_its_host_when_its_node_comes_back_under_another_id():
    flapping = roster(1, 2)
    seat(flapping, member("a", node="n1"))
    flapping.join(dataclasses.replace(member("b", node="n7"), host="10.0.0.7"), 50.0)
    assert flapping.wants_pause(99.0)
    for _ in range(FLAPS):
        flapping.lost_on(dataclasses.replace(member("c", node="n3"), host="10.0.0.7").home, 50.0)
    assert not flapping.wants_pause(99.0)


def test_after_the_loss_of_a_coordinator_its_survivors_gather():
    orphans = roster(1, 3)
    orphans.gather, orphans.generation = True, 4
    orphans.join(member("a", 9, 0), 50.0)
    assert orphans.form(50.0 + GATHER_S - 0.1) is None
    orphans.join(member("b", 9, 1), 52.0)
    assert orphans.form(52.0 + GATHER_S - 0.1) is None
    assert [m.id for m in orphans.form(52.0 + GATHER_S) or []] == ["a", "b"]
    assert orphans.generation == 5
    assert again(orphans, 10, 60.0) == ["a", "b"], "once"


def test_a_newcomer_does_not_begin_before_the_survivors_are_back():
    orphans = dataclasses.replace(roster(1, 8), gather=True, generation=4, expected=2)
    orphans.join(member("n", -1, -1), 50.0)
    assert (orphans.form(51.0), orphans.gathered(49.0, 51.0)) == (None, False)
    for name, rank in (("a", 0), ("b", 1)):
        orphans.join(member(name, 9, rank), 51.0)
    assert [m.id for m in orphans.form(51.6) or []] == ["a", "b", "n"]


seconds = st.floats(0.001, 1e4)


@given(seconds, st.lists(seconds), st.booleans())
def test_limits_that_are_given_are_taken(limit, steps, begun):
    assert stall_limit_s(limit, steps, begun) == silence_limit_s(limit, steps) == limit


@given(st.lists(seconds, min_size=1))
def test_limits_follow_the_steps(steps):
    """Never shorter than the floor; a stall is many steps long; silence does not depend on long steps."""
    low, high = min(steps), max(steps)
    stall, silence = stall_limit_s(0.0, iter(steps), True), silence_limit_s(0.0, iter(steps))
    assert max(SILENCE_FLOOR_S, STALL_STEPS * low) <= stall <= max(SILENCE_FLOOR_S, STALL_STEPS * high)
    assert SILENCE_FLOOR_S <= silence <= 30.0
    assert stall_limit_s(0.0, steps, False) == stall_limit_s(0.0, [], True) == FIRST_STEP_S
    assert silence_limit_s(0.0, []) == 30.0


def test_a_step_that_fails_again_in_the_same_way_is_no_accident():
    suspicion = Suspicion()
    assert not suspicion.raised(3, "KeyError: 'x'", 1)
    assert not suspicion.raised(3, "KeyError: 'x'", 1), "every rank of a generation raises it"
    assert not suspicion.raised(3, "KeyError: 'y'", 2)
    assert not suspicion.raised(4, "KeyError: 'x'", 2)
    assert suspicion.raised(3, "KeyError: 'x'", 2) == "step 3 failed twice in the same way: KeyError: 'x'"


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([(0, 8), (0, 4), (4, 8), (2, 5)])), max_size=12))
def test_deaths_are_suspicious_only_in_one_step_and_one_shard(deaths):
    """The run gets on from one step to the next: with no slack every step begins a new count."""
    suspicion, best = Suspicion(), 0
    row: list[set[int]] = []
    for progress, bounds in deaths:
        best += progress
        reason = suspicion.died(best, 0, range(*bounds))
        row = [*(row if not progress else []), set(range(*bounds))]
        deadly = [shard for shard in range(8) if sum(shard in held for held in row) >= SILENT_DEATHS]
        assert bool(reason) == bool(deadly)
        assert not reason or (f"step {best}," in reason and str(deadly) in reason)


def test_an_unrelated_death_does_not_hide_a_sample_that_kills():
    suspicion = Suspicion()
    suspicion.died(7, 0, range(4, 8))
    assert any(suspicion.died(7, 0, range(4)) for _ in range(SILENT_DEATHS))


def test_late_reports_do_not_make_one_step_look_like_two():
    suspicion = Suspicion()
    assert any(suspicion.died(best, 3, range(4)) for best in (18, 20, 20, 21))
    assert not any(Suspicion().died(best, 3, range(4)) for best in (18, 30, 40, 50))
