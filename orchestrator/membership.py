"""Seats the workers of a run in generations, hears their hearts, and ends a generation when one is lost.

Part of the coordinator; lives in its event loop. Its decisions are recovery.py's.
"""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable

from orchestrator.background import Background, notify_all
from orchestrator.balancer import Balancer
from orchestrator.channel import Beat, Desk, Pulse
from orchestrator.events import WorkerLeft
from orchestrator.journal import Journal
from orchestrator.recovery import FIRST_STEP_S, Member, Roster
from orchestrator.replicas import must_share
from orchestrator.reporter import REPORT_EVERY_S
from orchestrator.seats import Order, Seat
from orchestrator.shards import Placement
from orchestrator.suspicion import SILENT_DEATHS, Suspicion, Unreachable
from orchestrator.timekeeper import LEADS_S, STILL_S, Stillness, Timekeeper, judge, limits_s, shifted

REPORTS_LATE_S = REPORT_EVERY_S + 0.3  # what rank 0 and a heartbeat may be behind
CONNECTION_LOST = "connection_lost"  # a worker came back by itself: nothing new, if its generation has ended


class Membership:
    """Who is in the run. `journal` gets what happens; `end_run` is called with the reason why it cannot go on."""

    def __init__(
        self, journal: Journal, roster: Roster, balancer: Balancer, stall_s: float, max_incidents: int
    ) -> None:
        self.roster, self._journal, self._balancer = roster, journal, balancer
        gone = lambda member_id: self.lose(member_id, "worker_killed", "its process ended")  # noqa: E731
        self.desk = Desk(secrets.token_hex(16), self._heard, gone)
        self.end_run: Callable[..., None]
        self.kill: Callable[[Member], None]
        self.stopping = self.over = self.begun = False
        self.read_s, self.still_s = FIRST_STEP_S, STILL_S  # see Coordinator
        self._stall_s, self._max_incidents = stall_s, max_incidents
        self._suspicion, self.came_s, self.placement = Suspicion(), dict[str, float](), Placement((0, 1))
        self._pulses, self._answers = dict[str, Pulse](), dict[str, Seat | Order]()
        self._excluded = set[str]()
        self._newcomers = set[str]()  # in a generation whose others have the state
        # The kind of incident that it will be; who leads the end of a stop; who writes down what nobody else has.
        self._pausing, self._last, self._saving = "", "", ""
        self.changed, self.broken_s = asyncio.Condition(), time.time()
        self._unreachable, self._stillness = Unreachable(), Stillness()
        self.start = Background(journal.error).start

    def notify(self) -> None:
        """Let everyone who waits look again."""
        self.start(notify_all(self.changed))

    def excluded(self, member_id: str) -> bool:
        """Whether a worker was given up."""
        return member_id in self._excluded

    async def join(self, member: Member, why: str) -> Seat | Order:
        """A worker asks for a seat; answers when the next generation is complete, or with an order.

        Args:
            why: what ended its last generation, as it saw it; "" for a step boundary.
        """
        if self.excluded(member.id):
            return Order("excluded")
        if member.id in self.roster.seated:
            first = self.roster.training  # the others were told to come, and could not stay if they would
            self._end_generation(CONNECTION_LOST, f"rank {member.rank} lost a connection: {why}", 0.0)
            if why and first:
                self._note_fruitless(member.id, why)
            if self.excluded(member.id):
                return Order("excluded")
        now, self._saving = time.time(), "" if member.id == self._saving else self._saving
        self.roster.join(member, now)
        self._pulses[member.id] = Pulse(now, now, Beat(0, member.step, 0, True))
        self.seat()
        async with self.changed:
            await self.changed.wait_for(lambda: self.over or member.id in self._answers)
            return self._answers.pop(member.id, Order("over"))

    def _end_generation(self, kind: str, detail: str, silent_s: float) -> None:
        """The generation is over, unless it is already; its other workers are told to come back."""
        came_back = kind == CONNECTION_LOST
        if not self.roster.training:
            if not came_back:
                self._journal.break_off(kind, detail, 0, silent_s)
                self._tell_seated("end")
            return
        if self._pausing and came_back:
            kind, detail = self._pausing, ""
        else:
            self._tell_seated("end")
        if not self.stopping:
            self._journal.break_off(kind, detail, len(self.roster.seated), silent_s)
        self.roster.training, self.broken_s = False, time.time()
        self.notify()  # who waits for the others to finish has to come back

    def _note_fruitless(self, voter: str, why: str) -> None:
        """Workers cannot reach each other, though all reach the coordinator; one of them is given up in the end."""
        there = {m.id: m.host for m in self.roster.by_rank}
        if found := self.roster.seated.get(self._unreachable.note(self._journal.recorded, there, voter, why)):
            self.lose(found.id, "worker_unreachable", why)
            self.kill(found)

    def _tell_seated(self, word: str) -> None:
        for member in self.roster.seated:
            self.desk.tell(member, word, self.roster.generation)

    def seat(self) -> None:
        """Form the next generation if all are there who should be."""
        if self.over or self.roster.training or self.roster.seated:
            return
        self.roster.saved = self._journal.saved
        for member in [m for m in self.roster.ready.values() if self.roster.must_leave(m)]:
            del self.roster.ready[member.id]
            self._excluded.add(member.id)
            self._answers[member.id] = Order("leave")
            why = "straggler_left" if member.id in self.roster.unwanted else "node_drained"
            self._journal.log(WorkerLeft(why, member.rank, member.node, member.pid, "", member.home))
            self._balancer.forget(member.id)
            self.notify()
        if self.stopping:
            self._order_stop()
            return
        if self._saving not in self.roster.ready and (order := self.roster.form(time.time())) is not None:
            self._give_seats(order)

    def _give_seats(self, order: list[Member]) -> None:
        first, now, generation, size = order[0], time.time(), self.roster.generation, self.roster.size
        self.placement, share = self._balancer.placement(order), must_share(order, size)
        for rank, member in enumerate(order):
            where = (generation, rank, self.placement, first.store, first.step, share, self._journal.recorded, size)
            self._answers[member.id] = Seat(*where, frozenset(self._journal.fired), self._journal.unsaved_s())
            self.roster.seated[member.id] = dataclasses.replace(member, rank=rank, step=max(0, first.step))
            self._pulses[member.id] = Pulse(now, now, Beat(generation, member.step, -1, True))
        self._newcomers = {m.id for m in order if m.step < 0 <= first.step}
        self._pausing, self.begun = "", False
        self._suspicion.can_train(now)
        self.notify()

    def _order_stop(self) -> None:
        """A stop was asked for: who has the newest state writes it down."""
        if self._last:
            pulse = self._pulses.get(self._last)
            if self.excluded(self._last) or (pulse and time.time() - pulse.heard_s > LEADS_S):
                self.end_run("the worker that wrote down the state of the stop was lost; earlier checkpoints are kept")
            return
        if self.roster.gather and not self.roster.gathered(self.broken_s, time.time()):
            return
        there = self.roster.by_state()
        if not there:
            self.roster.minimum = 1  # parts of a state: its holders write it down after one more step
            order = self.roster.form(time.time())
            self._give_seats(order) if order and order[0].step >= 0 else self.end_run("")
            return
        self._last = there[0].id
        self._answers |= {m.id: Order("stop", lead=m.id == self._last) for m in there}
        self.roster.ready.clear()
        self.notify()

    def save(self) -> None:
        """Nodes will go: where nobody trains, who has the newest state writes it down, and waits on."""
        there = [] if self.roster.seated or not self.begun else self.roster.by_state()
        if there and there[0].step > self._journal.saved and not self.stopping:
            self._answers[there[0].id], self._saving = Order("save"), there[0].id
            self.notify()

    def pause(self, kind: str = "workers_joined") -> None:
        """End the generation at its next step boundary; `kind` as in events.Incident."""
        if self.roster.training and self.begun and not self._pausing:
            self._pausing = kind
            self._tell_seated("stop" if self.stopping or self.roster.saves else "pause")

    def abandon(self) -> None:
        """The run is over: whoever trains stops at once, whoever waits is told."""
        self.over = True
        self._tell_seated("end")
        self.notify()

    def _heard(self, member_id: str, beat: Beat) -> None:
        pulse, now = self._pulses.get(member_id), time.time()
        if pulse is not None:
            moved = beat.place != pulse.beat.place or beat.generation != pulse.beat.generation or beat.waiting
            self._pulses[member_id] = Pulse(now, now if moved else pulse.moved_s, beat)
            self._balancer.heard(member_id, pulse.beat, beat)

    def lose(self, member_id: str, kind: str, detail: str) -> None:
        """A worker is lost, for good: `kind` as in events.Incident."""
        if self.excluded(member_id) or self.over:
            return
        self._excluded.add(member_id)
        self.desk.hang_up(member_id)
        self._balancer.forget(member_id)
        now, pulse, member = time.time(), self._pulses.pop(member_id, None), self.roster.seated.get(member_id)
        if member is None:
            if kind == "worker_frozen" and member_id in self.roster.ready:
                self.kill(self.roster.ready[member_id])
            self.roster.lose(member_id)
            self._answers[member_id] = Order("excluded")  # it may be alive, and wait for a seat
            if pulse is None and kind != "node_lost":
                self.ended_early(self.came_s.get(member_id, now), detail)
            return self.notify()
        in_step = self.begun and self.roster.training and pulse is not None and not pulse.beat.waiting
        silent_s, said = now - pulse.heard_s if pulse else 0.0, f"rank {member.rank} (process {member.pid}): {detail}"
        self._end_generation(kind, said, silent_s)
        self.roster.lose(member_id)
        self.roster.lost_on(member.home, now, self.roster.generation)
        self._journal.blame(member.node)
        self._journal.log(WorkerLeft(kind, member.rank, member.node, member.pid, detail, member.home))
        if kind in ("worker_frozen", "worker_stuck"):
            self.kill(member)
        reason = ""
        if kind == "worker_killed" and in_step:
            seconds = self._journal.step_seconds()
            slack = 1 + int(REPORTS_LATE_S / max(1e-3, min(seconds))) if seconds else 1
            shards = self.placement.range_of(member.rank // self.roster.size)
            reason = self._suspicion.died(self._journal.best, slack, shards, self._journal.recorded)
        self._end_if(self._suspicion.lost(self._incident(), self._max_incidents) or reason)
        self.seat()

    def _incident(self) -> int:  # what the losses of one have in common
        return self.roster.generation

    def failed(self, member_id: str, step: int, error: str) -> None:
        """A worker raised and ends; one that fails as another did before it is no accident."""
        # Before it has the state a newcomer is in no step; what it lacks is its machine's.
        seated = member_id in self.roster.seated and (self.begun or member_id not in self._newcomers)
        reason = self._suspicion.raised(step, error, self.roster.generation) if seated else ""
        self.lose(member_id, "worker_failed", error)
        self._end_if(reason)

    def ended_early(self, came_s: float, how: str) -> None:
        """A worker that came at `came_s` has ended; if none is left or ready since, that is no machine's fault."""
        if self.roster.seated or self.roster.ready or self.roster.gather:
            self._suspicion.can_train(time.time())
        elif self._suspicion.ended_early(came_s, time.time()):
            why = f"workers ended before they could train, {SILENT_DEATHS} times one after the other: {how}"
            self._end_if(why, "never_ready")

    def _end_if(self, reason: str, kind: str = "") -> None:
        if reason and not self.over:
            self.end_run(reason, kind)

    async def tick_forever(self) -> None:
        """Look after time: silence, joiners that have settled, pings."""
        ping = lambda: self.desk.tell_all("ping")  # noqa: E731
        await Timekeeper(lambda: self.over, self._look, ping, self._shift, self._journal.error).run()

    def _shift(self, by_s: float) -> None:
        for pulse in self._pulses.values():
            pulse.heard_s, pulse.moved_s = shifted(pulse.heard_s, by_s), shifted(pulse.moved_s, by_s)
        self.broken_s += by_s
        self.roster.shift(by_s)

    def _look(self, now: float) -> None:
        self._check_pulses(now)
        if self.roster.wants_pause(now):
            self.pause("node_drained" if self.roster.drained else "workers_joined")
        self._balance(now)
        self.seat()

    def _balance(self, now: float) -> None:
        """Move shards from slow workers to quick ones; a worker that only holds the others up leaves."""
        if self._pausing or not (self.roster.training and self.begun and self._balancer.judges(now)):
            return
        order = self.roster.by_rank
        slow = self._balancer.straggler(order)
        if slow is not None and len(order) > self.roster.minimum:
            self.roster.dismiss(slow, now)
            self.pause("straggler_left")
        elif self._balancer.wants_move(order, self.placement):
            self.pause("rebalanced")

    def _check_pulses(self, now: float) -> None:
        heard = [self._pulses[m.id].heard_s for m in self.roster.everyone if m.id in self._pulses]
        silence, stall = limits_s(self._stall_s, self._journal.step_seconds(), self.begun, heard, now)
        fresh = self._newcomers if self._journal.stepped < self.roster.generation else ()  # libraries may be loaded
        for member_id in [member.id for member in self.roster.everyone]:
            if pulse := self._pulses.get(member_id):
                limit_s = max(self._stall_s or stall, self.read_s if pulse.beat.reading or member_id in fresh else 0.0)
                called = not self.roster.training and member_id in self.roster.seated
                lost = judge(pulse, now, silence, limit_s, now - self.broken_s if called else None)
                if lost and lost[0] == "worker_stuck":
                    self.desk.tell(member_id, "dump", self.roster.generation)
                if lost:
                    self.lose(member_id, *lost)
        self._check_connections(now, max(self.still_s, 2 * stall if self.begun else 0.0))

    def _check_connections(self, now: float, limit_s: float) -> None:
        """Packets between two workers may be lost without a word, while both reach the coordinator."""
        beats = [self._pulses[m.id].beat for m in self.roster.by_rank if m.id in self._pulses]
        still_s = self._stillness.seconds(now, beats)
        if self.roster.training and still_s > limit_s:
            self._pausing, why = "", f"all workers wait for each other for {still_s:.0f} s"
            self._end_generation(CONNECTION_LOST, why, still_s)
            self._note_fruitless("", why)
