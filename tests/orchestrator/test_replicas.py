"""Replica groups: who holds which part, who is seated, and where the state comes from."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.layout import Layout, group_placement, layout_of, room_for_whole, unit_placement, units_of, usable
from orchestrator.recovery import Holding, Member
from orchestrator.replicas import ReplicaRoster, must_share
from orchestrator.split_worker import SplitWorker
from orchestrator.stores import PeerLostError
from orchestrator.values import Parallel

KINDS = st.one_of(
    st.just(Parallel("fsdp", 0)),
    st.builds(Parallel, st.just("hsdp"), st.sampled_from([2, 4, 8])),
    st.builds(Parallel, st.sampled_from(["tensor", "pipeline"]), st.integers(2, 8)),
)
LATER = 1000.0


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_rank_has_one_group_and_one_part(groups, size):
    layout = Layout(groups * size, size)
    assert [rank for group in range(groups) for rank in layout.members(group)] == list(range(groups * size))
    assert sorted(rank for part in range(size) for rank in layout.holders(part)) == list(range(groups * size))
    for rank in range(layout.workers):
        assert rank in layout.members(layout.group_of(rank))
        assert rank in layout.holders(layout.part_of(rank))


@given(KINDS, st.integers(1, 64), st.sampled_from([1, 2, 8, 64]))
def test_groups_are_whole_and_share_all_shards(parallel, workers, shards):
    count = usable(parallel, workers, shards)
    assert count <= workers
    if not count:
        return
    layout = layout_of(parallel, count)
    placement = group_placement(parallel, layout, shards)
    assert (placement.workers, placement.shards) == (layout.groups, shards)
    units, each = units_of(parallel, layout, shards)
    dealt = unit_placement(parallel, layout, placement)
    assert (dealt.workers, dealt.shards) == (layout.groups, units)
    assert units & (units - 1) == 0
    for group in range(layout.groups):
        held = [shard for unit in dealt.range_of(group) for shard in range(unit * each, (unit + 1) * each)]
        assert [shard for shard in held if shard < shards] == list(placement.range_of(group))


def roster(parallel: str, workers: int, minimum: int = 1) -> ReplicaRoster:
    return ReplicaRoster(minimum, workers, workers, parallel=Parallel.parse(parallel), shards=8)


def member(name: str, **changes: object) -> Member:
    return dataclasses.replace(Member(name, f"n-{name}", 1, "cpu", -1, -1, ("h", 1)), **changes)


def train(r: ReplicaRoster, names: str) -> list[Member]:
    """All come, sit and train."""
    for name in names:
        r.join(member(name), 0.0)
    order = r.form(LATER)
    assert order is not None
    return order


def come_back(r: ReplicaRoster, step: int, lost: str = "", whole: str = "") -> None:
    """A generation has ended; all but the lost ones ask for a seat with what they hold."""
    for m in r.by_rank:
        if m.id in lost:
            r.lose(m.id)
    for m in r.by_rank:
        holds = Holding(m.rank % r.size, r.size, m.id in whole)
        r.join(dataclasses.replace(m, step=step, holds=holds), 1.0)


def sit(r: ReplicaRoster, order: list[Member] | None) -> str:
    assert order is not None
    for rank, m in enumerate(order):
        r.seated[m.id] = dataclasses.replace(m, rank=rank)
    return "".join(m.id for m in order)


def test_a_group_that_loses_a_member_leaves_as_a_whole():
    r = roster("tensor=2", 4)
    assert sit(r, train(r, "abcd")) == "abcd"
    come_back(r, 7, lost="b")
    order = r.form(LATER)
    assert sit(r, order) == "cd"
    assert [m.step for m in order] == [7, 7]
    assert not must_share(order, 2)
    assert list(r.ready) == ["a"]  # waits for another one to make a group with
    r.join(member("e"), LATER)
    assert r.wants_pause(LATER + 1)


def test_members_of_two_broken_groups_make_a_whole_one():
    r = roster("pipeline=2", 4)
    sit(r, train(r, "abcd"))
    come_back(r, 7, lost="bc")
    order = r.form(LATER)
    assert sit(r, order) == "ad"
    assert {m.step for m in order} == {7}


@pytest.mark.parametrize(
    ("parallel", "names", "lost"), [("tensor=2", "abcd", "bd"), ("fsdp", "abcd", "c"), ("hsdp=2", "abcd", "ac")]
)
def test_all_go_back_to_the_checkpoint_where_no_group_is_whole(parallel, names, lost):
    r = roster(parallel, 4)
    sit(r, train(r, names))
    come_back(r, 7, lost=lost)
    order = r.form(LATER)
    assert order is not None
    assert {m.step for m in order} == {-1}
    assert len(order) == (3 if parallel == "fsdp" else 2)


def test_too_few_for_a_group_wait():
    r = roster("tensor=2", 2)
    sit(r, train(r, "ab"))
    come_back(r, 7, lost="b")
    assert r.form(LATER) is None
    assert r.missing() == 1
    r.join(member("c"), LATER)
    assert {m.step for m in r.form(LATER + 9)} == {-1}


def test_a_lone_joiner_of_tensor_ends_no_generation():
    r = roster("tensor=2", 4)
    sit(r, train(r, "abcd"))
    come_back(r, 7, lost="ab")
    assert sit(r, r.form(LATER)) == "cd"
    r.join(member("e"), LATER)
    assert not r.wants_pause(LATER + 1)
    r.join(member("f"), LATER)
    assert r.wants_pause(LATER + 1)


def test_fsdp_grows_from_a_whole_state_and_loses_nothing():
    r = roster("fsdp", 4)
    r.expected = 2
    sit(r, train(r, "ab"))
    r.join(member("c"), LATER)
    assert r.wants_pause(LATER + 1)
    come_back(r, 5, whole="ab")
    order = r.form(LATER + 2)
    assert sit(r, order) == "abc"
    assert order[0].holds.whole
    assert {m.step for m in order if m.holds.whole} == {5}
    assert must_share(order, 3)


def test_fsdp_goes_on_without_the_joiner_where_that_saves_the_state():
    r = roster("fsdp", 4)
    r.expected = 2
    sit(r, train(r, "ab"))
    r.join(member("c"), LATER)
    come_back(r, 5)  # a lost connection: nobody took the whole state along
    order = r.form(LATER + 9)
    assert sit(r, order) == "ab"
    assert {m.step for m in order} == {5}
    assert r.wants_pause(LATER + 99)


def test_a_holder_on_a_node_that_goes_hands_its_state_on():
    r = roster("tensor=2", 4)
    sit(r, train(r, "abcd"))
    r.draining = frozenset({"n-a"})
    assert r.wants_pause(LATER)
    come_back(r, 5, whole="abcd")
    assert all(r.must_leave(m) == (m.id == "a") for m in list(r.ready.values()))
    del r.ready["a"]
    order = r.form(LATER)
    assert order[0].step == 5
    assert len(order) == 2


def test_the_whole_state_is_taken_along_where_every_host_has_room_for_it():
    """Parts of 30 and 20 bytes; of each group of two, both would carry the 50."""
    one, two = Layout(2, 2), Layout(4, 2)
    told = [("a", True, 30, 200), ("a", True, 20, 200)]
    assert room_for_whole(told, one)
    assert not room_for_whole([("a", True, 30, 199), ("a", True, 20, 199)], one)
    assert not room_for_whole(told * 2, two)
    assert room_for_whole([*told, ("b", True, 30, 200), ("b", True, 20, 200)], two)
    assert not room_for_whole([*told, ("b", True, 30, 200), ("c", True, 20, 99)], two)


def test_a_holder_leaves_when_its_state_is_in_storage():
    r = roster("tensor=2", 3)
    sit(r, train(r, "ab"))
    r.join(member("c"), LATER)
    r.draining = frozenset({"n-a"})
    come_back(r, 5)
    assert not any(r.must_leave(m) for m in r.ready.values()), "nobody else has its part"
    r.ready["a"] = dataclasses.replace(r.ready["a"], holds=Holding(0, 2, saved=True))
    assert [m.id for m in r.ready.values() if r.must_leave(m)] == ["a"]
    del r.ready["a"]
    assert {m.step for m in r.form(LATER)} == {-1}


def test_a_stop_is_led_by_one_hand_or_by_who_has_it_written():
    r = roster("pipeline=2", 2)
    sit(r, train(r, "ab"))
    come_back(r, 5)
    assert not r.by_state(), "together they have the state, but it is nowhere whole"
    r.ready["b"] = dataclasses.replace(r.ready["b"], holds=Holding(1, 2, saved=True))
    assert r.by_state()[0].id == "b"
    r.ready["b"] = dataclasses.replace(r.ready["b"], step=4)
    assert not r.by_state(), "an older state"


def test_who_waits_with_an_old_state_does_not_win_over_a_newer_checkpoint():
    """Drained to one group, the left-over keeps the whole state of then; the group breaks much later."""
    r = roster("tensor=2", 4)
    sit(r, train(r, "abcd"))
    come_back(r, 100, lost="d", whole="abc")
    sit(r, r.form(LATER))
    assert set(r.seated) == {"a", "b"}
    assert r.ready["c"].step == 100
    r.saved = 4990
    come_back(r, 5000, lost="b")
    order = r.form(LATER)
    assert order is not None
    assert {m.step for m in order} == {-1}, "all go on from the checkpoint"
    assert len(order) == 2
    r = roster("tensor=2", 4)
    sit(r, train(r, "abcd"))
    come_back(r, 100, lost="d", whole="abc")
    r.saved = 100
    assert {m.step for m in r.form(LATER)} == {100}, "as new as the checkpoint: nothing has to be read"


def test_fsdp_grows_by_a_checkpoint_where_nobody_could_take_the_state_along():
    r = roster("fsdp", 3)
    sit(r, train(r, "ab"))
    r.join(member("c"), LATER)
    for m in r.by_rank:
        r.join(dataclasses.replace(m, step=7, holds=Holding(m.rank, 2, saved=True)), LATER)
    order = r.form(2 * LATER)
    assert order is not None
    assert (len(order), {m.step for m in order}) == (3, {-1})
    assert not r.wants_pause(3 * LATER), "it has grown"


def test_a_group_of_those_who_have_the_newer_state_is_preferred_to_an_older_checkpoint():
    r = roster("fsdp", 3)
    sit(r, train(r, "ab"))
    r.join(member("c"), LATER)
    r.saved = 3
    come_back(r, 7)
    assert [(m.id, m.step) for m in r.form(2 * LATER)] == [("a", 7), ("b", 7)]


class Leaving:
    """The state of one group, its recorder, and its line to a rank 0 that is lost while it writes."""

    layout = seating = None

    def __init__(self, stops: bool) -> None:
        self.stopping, self.leads, self.written = stops, False, 0
        self.seating, self.carries = self, 1

    def pieces(self) -> dict:
        return {}

    def gather_objects(self, told: object) -> list:
        return [told]

    def checkpoint_now(self, state: object, lead: bool) -> None:
        self.written += 1

    def sha256(self) -> str:
        return "ab" * 32

    def broadcast_object(self, word: object) -> None:
        raise PeerLostError("Connection closed by peer")


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_held_for_one():
    """A stop, two groups: while rank 0's writes, it is lost. The other group has the state, and no checkpoint."""
    worker = object.__new__(SplitWorker)
    worker._state = worker._recorder = group = Leaving(stops=True)
    worker._sha256, worker._whole, worker._host = "", {}, "10.0.0.1"
    with pytest.raises(PeerLostError):
        worker._leave(group)
    assert group.written == 1
    assert worker._sha256 == ""
