"""Random histories of a roster: joins, losses, drains, flapping nodes and time in any order."""

import dataclasses
import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.recovery import GATHER_S, SETTLE_S, START_GRACE_S, Member, Roster

NODES = ("n0", "n1", "n2")
nodes = st.sampled_from(NODES)


class Histories(RuleBasedStateMachine):
    """A run that at times has more members than seats."""

    @initialize(low=st.integers(1, 3), more=st.integers(0, 3), spare=st.integers(0, 2), data=st.data())
    def start(self, low, more, spare, data):
        high = low + more
        self.roster = Roster(low, high, data.draw(st.integers(low, high)), gather=data.draw(st.booleans()))
        self.most = high + (spare if high > 1 else 0)  # with one seat a joiner could not receive the state
        self.now = self.joined_s = 0.0
        self.names = 0

    def members(self) -> dict[str, Member]:
        return {**self.roster.ready, **self.roster.seated}

    def draw(self, data: st.DataObject, members: dict[str, Member]) -> Member:
        return members[data.draw(st.sampled_from(sorted(members)))]

    def avoided(self, m: Member) -> bool:
        in_use = any(other.home == m.home and other.step >= 0 for other in self.members().values())
        left_out = self.roster.left_out.get(m.home, 0.0) > self.now and not in_use
        return m.node in self.roster.draining or left_out

    @precondition(lambda self: len(self.members()) < self.most)
    @rule(node=nodes, count=st.integers(1, 3), step=st.sampled_from((-1, -1, -1, 0, 4)))
    def join(self, node, count, step):
        """Without state; or with that of a generation that an earlier coordinator knew of."""
        for _ in range(min(count, self.most - len(self.members()))):
            self.names += 1
            self.roster.join(Member(f"m{self.names}", node, 1, "cpu", step, -1, ("", 1)), self.now)
            self.joined_s = self.now

    def back(self, m: Member, step: int) -> None:
        self.roster.join(dataclasses.replace(m, step=step), self.now)

    @precondition(lambda self: self.roster.seated)
    @rule(data=st.data(), steps=st.integers(0, 2))
    def come_back(self, data, steps):
        """A member's generation broke; one that had not received the state yet still has none."""
        m = self.draw(data, self.roster.seated)
        self.back(m, -1 if m.step < 0 and not steps else max(0, m.step) + steps)

    @precondition(lambda self: self.members())
    @rule(data=st.data())
    def lose(self, data):
        m, sat = self.draw(data, self.members()), set(self.roster.seated)
        found = self.roster.lose(m.id)
        assert (found is not None) == (m.id in sat)
        assert m.id not in self.members()

    @rule(node=nodes, twice=st.booleans())
    def flap(self, node, twice):
        for _ in range(1 + 2 * twice):
            self.roster.lost_on(node, self.now)

    @rule(draining=st.sets(nodes))
    def drain(self, draining):
        self.roster.draining = frozenset(draining)

    @rule(passed=st.floats(0, 100))
    def wait(self, passed):
        self.now += passed

    @rule()
    def form(self):
        self.formed()

    def formed(self) -> bool:
        """Form a generation if it is time; all that must be true of it."""
        roster, ready = self.roster, dict(self.roster.ready)
        out, generation = bool(roster.seated), roster.generation
        avoided = {m.id for m in ready.values() if self.avoided(m)}
        stay_s = START_GRACE_S if all(m.step < 0 for m in ready.values()) else GATHER_S if roster.gather else 0.0
        order = roster.form(self.now)
        if order is None:
            early = self.now - self.joined_s < stay_s
            assert out or len(ready) < roster.minimum or early, "enough are there and nobody is waited for"
            assert roster.generation == generation
            return False
        assert not out, "seated members have not come back yet"
        ids = [m.id for m in order]
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(ready)
        assert roster.minimum <= len(ids) <= roster.maximum
        assert set(roster.seated) == set(ids)
        assert set(roster.ready) == set(ready) - set(ids)
        assert roster.training
        assert roster.generation == generation + 1
        newest = max(m.step for m in ready.values())
        assert order[0].step == newest, "the newest state is abandoned"
        nodes = [node for node, _ in itertools.groupby(order, key=lambda m: m.node)]
        assert len(set(nodes)) == len(nodes), "workers of a node are no neighbours"
        first = [m for n, m in enumerate(order) if m.node not in {before.node for before in order[:n]}]
        for some in (first, *([m for m in order if m.node == node] for node in nodes)):
            assert [m.step for m in some] == sorted((m.step for m in some), reverse=True)
            for step in {m.step for m in some}:
                ranks = [m.rank for m in some if m.step == step]
                old = [rank for rank in ranks if rank >= 0]
                assert ranks[: len(old)] == sorted(old), "ranks do not stay as they were"
        staying = [m for m in ready.values() if m.id not in avoided]
        if avoided & set(ids):
            assert len(staying) < roster.minimum or all(m.step < newest for m in staying)
        left = {m.id for m in staying} - set(ids)
        assert not left or len(ids) == roster.maximum, "somebody is left out though there is a seat"
        assert not left or len(avoided & set(ids)) <= all(m.step < newest for m in staying), "who leaves takes a seat"
        for rank, m in enumerate(order):
            roster.seated[m.id] = dataclasses.replace(m, rank=rank)
        return True

    @precondition(lambda self: self.roster.training)
    @rule(step=st.integers(1, 5))
    def pauses_come_to_an_end_and_change_something(self, step):
        """Step boundaries until nothing is wanted any more; all have the same steps there."""
        self.now += SETTLE_S + 0.1
        for _ in range(4):
            if not self.roster.wants_pause(self.now):
                return
            before = set(self.roster.seated)
            step += max(0, max(m.step for m in self.roster.seated.values()))
            for m in list(self.roster.seated.values()):
                self.back(m, step)
            for m in [m for m in self.roster.ready.values() if self.roster.must_leave(m)]:
                assert m.node in self.roster.draining
                del self.roster.ready[m.id]
            assert self.formed(), "a pause ended training"
            assert set(self.roster.seated) != before, "a pause for nothing"
            assert max(m.step for m in self.roster.seated.values()) >= step
        raise AssertionError("one pause after the other")

    @invariant()
    def nobody_is_seated_and_waiting(self):
        if hasattr(self, "roster"):
            assert not set(self.roster.seated) & set(self.roster.ready)
            assert not self.roster.training or self.roster.seated
            assert len(self.roster.seated) <= self.roster.maximum

    def teardown(self):
        """Whatever happened: when all have come back, enough are there and time passes, training goes on."""
        if not hasattr(self, "roster"):
            return
        for m in list(self.roster.seated.values()):
            self.back(m, m.step)
        self.now += START_GRACE_S + 1.0
        assert self.formed() == (len(self.members()) >= self.roster.minimum)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=30)
