"""The coordinator: one actor a run that its workers report to; it keeps the run's logs and decides its end.

It imports neither torch nor the workload, so it is up before the workers are.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.balancer import Balancer
from orchestrator.errors import StorageError
from orchestrator.events import Event, GenerationStarted, NodeDraining, PhaseBegan, WorkerFailed
from orchestrator.failure import Failure, Place
from orchestrator.injector import FaultSchedule
from orchestrator.journal import Journal
from orchestrator.lastwords import at_fault, describe, last_loss, what_is_kept
from orchestrator.membership import Membership
from orchestrator.nodewatch import NodeWatch, end_process
from orchestrator.recovery import FIRST_STEP_S, Member
from orchestrator.replicas import roster_of
from orchestrator.seats import Assignment, Order, Seat, Status
from orchestrator.suspicion import Newcomers
from orchestrator.timekeeper import STILL_S
from orchestrator.values import NO, Figures, keep_largest

MORE_S = 10.0  # than storage is waited for, until it is the worker that does not get on
LAST_CHECKPOINT_S = 5.0  # Ray Train gives workers as long, once the run is over
log = logging.getLogger("orchestrator.coordinator")


class Coordinator:
    """State of one run as its workers report it. An asyncio actor: methods never block."""

    members_kind = Membership

    def __init__(self, assignment: Assignment) -> None:
        import ray

        from orchestrator.prometheus import listener_for

        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._plan, config = assignment.plan, assignment.plan.config
        self._host = "127.0.0.1" if assignment.loopback else ray.util.get_node_ip_address()
        told = (assignment.description, assignment.started_s, again, listener_for(self._plan, assignment.loopback))
        self._journal = Journal(self._plan, assignment.uri, assignment.token, *told)
        roster = roster_of(config, assignment.maximum, assignment.expected)
        roster.generation, roster.gather = self._journal.generation, self._journal.again
        roster.expected = min(roster.maximum, max(roster.expected, self._journal.workers))
        parts = (self._journal, roster, Balancer.of(self._journal, self._plan))
        self._members = self.members_kind(*parts, config.stall_limit, config.max_incidents)
        self._members.end_run = self._end_by_members
        patience_s = config.storage_patience + MORE_S  # twice: one may wait for another, who waits in vain
        self._members.read_s, self._members.still_s = max(FIRST_STEP_S, 2 * patience_s), max(STILL_S, patience_s)
        self._members.kill = lambda member: self._members.start(self._end_process(member))
        self._watch, self._faults = NodeWatch(), FaultSchedule(assignment.faults, self._journal, self._members)
        self._listening: asyncio.Future[int] | None = None
        self._finished, self._phase, self._newcomers = dict[str, str](), "starting workers", Newcomers()
        self._noted: PhaseBegan | None = None
        self._outcome, self._message, self._exit_status = self._journal.ended_as()
        self._members.over = bool(self._outcome)
        self._failing, self._told, self._written = False, set[int](), asyncio.Event()
        if self._outcome:
            self._written.set()

    async def enlist(self, member_id: str) -> tuple[str, int, str] | None:
        """Where a worker's channel goes: host, port, secret. None: the run is over, or the worker was given up."""
        port = await self._listen()
        self._members.came_s.setdefault(member_id, time.time())
        if self._members.over or self._members.excluded(member_id):
            return None
        self._members.desk.hang_up(member_id)  # it comes again: the end of its old connection is not its own
        return self._host, port, self._members.desk.secret

    async def _listen(self) -> int:
        """The desk's port; the first who asks opens it, and from then on time is looked after."""
        if self._listening is None:
            self._listening = asyncio.get_running_loop().create_future()
            self._listening.set_result(await self._members.desk.open(self._host))
            self._members.start(self._members.tick_forever())
            self._members.start(self._watch_nodes())
        return await self._listening

    async def join(self, member: Member, why: str) -> Seat | Order:
        """A worker asks for a seat, and says why it left its last one; answers when a generation is complete."""
        return Order("over") if self._outcome else await self._members.join(member, why)

    async def begin(self, seat: Seat, step: int, load_s: float, restore_s: float, bad: list[str]) -> None:
        """Rank 0 of a new generation: all have the state, training begins with `step` steps done."""
        roster = self._members.roster
        if seat.generation != roster.generation or not roster.training:
            return
        seated = roster.by_rank
        ranges = [[r.start, r.stop] for r in seat.placement for _ in range(seat.size)]
        where = (ranges, [m.node for m in seated], [m.pid for m in seated], seated[0].device)
        started = GenerationStarted(seat.generation, step, len(seated), *where, [m.device for m in seated])
        self._journal.generation_begins(started, load_s, restore_s, bad)
        self._members.begun, self._newcomers = True, Newcomers()
        self._finished, self._phase = {}, "training"
        self._faults.begin()
        if self._members.stopping:
            self._members.pause()

    async def report(self, records: list[dict[str, Any]], events: list[Event], keep: bool = False) -> None:
        """Committed steps and events of rank 0, in order; `keep` waits until all that was told is in storage."""
        if self._is_taken_over():
            return
        self._journal.steps(records)
        self._faults.start()
        self._journal.log(*events)
        if keep:
            await asyncio.to_thread(self._journal.flush)

    async def is_over(self) -> bool:
        """Whether the run has ended."""
        return bool(self._outcome)

    async def may_fire(self, number: int, rank: int) -> bool:
        """Whether fault `number` of the schedule happens now, on this rank; yes once."""
        if number in self._faults.fired:
            return False
        self._faults.note(number, rank)
        return True

    async def fault_failed(self, number: int, problem: str) -> None:
        """A fault that was noted could not be made to happen."""
        self._faults.note(number, -1, problem=problem)

    async def phase(self, text: str) -> None:
        """What the workers are doing, for people."""
        self._phase = text

    async def worker_failed(self, member_id: str, place: Place, error: str, traceback: str) -> None:
        """A worker raised and will end; the run goes on without it, unless that would end the same way."""
        self._journal.error(f"rank {place.worker}, step {place.step}:\n{traceback}")
        self._journal.log(WorkerFailed(place.worker, place.step, error))
        self._members.failed(member_id, place.step, error)

    async def process_ended(self, came_s: float, how: str) -> None:
        """A worker's process that came at `came_s` has ended with an error; it may never have been known here."""
        self._members.ended_early(came_s, how)

    async def stack(self, rank: int, text: str) -> None:
        """The stack of a worker that does not get on."""
        self._journal.error(f"rank {rank} does not get on; its stack:\n{text}")

    async def fail(
        self, message: str, exit_status: int, traceback: str, kind: str = "ray_train", place: Place | None = None
    ) -> bool:
        """The run cannot go on, which a worker at `place` has found, or the command; answers when that is written.

        False: it does go on, for others did not find what one that left did, or a newcomer unless several are missing.
        """
        gone = place is not None and self._members.excluded(place.member)
        newcomer = place is not None and place.worker < 0 and (self._faults.begun_s or self._journal.workers)
        if gone or (newcomer and self._newcomers.spare(self._members.roster.misses)):
            return False
        self._journal.error(traceback)
        self._told.add(place.worker if place else -1)
        self._fail(message, exit_status, kind, place and at_fault(place, self._members.roster, self._members.placement))
        await self._written.wait()
        return True

    def _fail(self, message: str, exit_status: int, kind: str, place: Place | None = None) -> None:
        """Nobody trains on; the rest is written down when it is known what the worker has said last."""
        if self._outcome or self._failing:
            return
        self._failing = True
        leaders = self._members.roster.by_rank[:1] if place else []
        self._members.abandon()
        self._members.start(self._write_failure(Failure(kind, message), exit_status, place, leaders))

    async def _write_failure(self, found: Failure, exit_status: int, place: Place | None, lead: list[Member]) -> None:
        """Ask the node for the worker's last lines, and give who leads the time to write its checkpoint."""
        try:
            if place:
                found = await describe(found, place, self._watch, self._journal)
            until, seated = time.monotonic() + LAST_CHECKPOINT_S, self._members.roster.seated
            while any(m.id in seated and m.rank not in self._told for m in lead) and time.monotonic() < until:
                await asyncio.sleep(0.05)
        finally:
            self._failing = False
            found = what_is_kept(found, self._journal, self._plan)
            self._end("failed", found.error, exit_status, failure=found)

    async def request_stop(self) -> None:
        """Ask the workers to checkpoint and stop after the current step."""
        self._members.stopping = True
        await self._listen()
        self._members.pause()
        self._members.seat()

    async def finish(self, member_id: str, generation: int, sha256: str, metrics: Figures, size: Figures = NO) -> bool:
        """A worker is done; answers whether the run is over. If not, another was lost before: it has to come back."""
        keep_largest(self._journal.figures.setdefault("memory_bytes", {}), size)
        roster, changed = self._members.roster, self._members.changed
        current = lambda: generation == roster.generation and roster.training  # noqa: E731
        if not self._outcome and current():
            self._finished[member_id] = sha256
            mixed = len({m.device for m in roster.seated.values()}) > 1  # which was told
            if len(set(self._finished.values())) > 1 and not mixed:
                self._fail(f"workers disagree on the final weights: {self._finished}", 1, "different_weights")
            elif set(roster.seated) <= set(self._finished):
                self._end("finished", "", 0, self._finished[roster.by_rank[0].id], metrics)
        async with changed:
            await changed.wait_for(lambda: self._outcome or not current())
        return bool(self._outcome)

    async def stopped(self, step: int, sha256: str) -> None:
        """The worker that leads a stop has written its checkpoint."""
        self._end("stopped", f"on request, after step {step} of {self._plan.total_steps} and a checkpoint", 130, sha256)

    def _end_by_members(self, reason: str, kind: str = "") -> None:
        if reason:
            self._journal.error(reason)
            found, place = (kind, None) if kind else last_loss(self._journal)
            self._fail(reason, 1, found, place)
        else:
            told = "with the newest checkpoint" if self._journal.first_step >= 0 else "before this command's first step"
            self._end("stopped", f"on request, {told}", 130)

    def _end(
        self, outcome: str, message: str, exit_status: int, sha256: str = "",
        metrics: Mapping[str, float] | None = None, failure: Failure | None = None,
    ) -> None:  # fmt: skip
        """The run's end, written down; the first one counts."""
        if self._outcome or self._failing:
            return
        self._message, self._exit_status = message, exit_status
        try:
            self._journal.end(outcome, message, sha256, metrics or {}, failure)
        except (StorageError, OSError) as error:
            log.exception("the run's end cannot be written down")
            outcome, self._exit_status = "failed", 1
            self._message = f"{error}; what was there before is kept"
        self._outcome = outcome
        self._written.set()
        self._members.abandon()

    async def _end_process(self, member: Member) -> None:
        text = await end_process(member.node, member.pid)
        self._journal.error(f"rank {member.rank}, process {member.pid}, was given up and killed; its stack:\n{text}")

    async def _watch_nodes(self) -> None:
        roster = self._members.roster
        while not self._outcome:
            await asyncio.sleep(self._watch.every_s)
            try:
                alive, draining = await asyncio.to_thread(self._watch.look)
            except Exception:  # Ray's head is away: what workers do is known without it
                log.warning("Ray's nodes cannot be read", exc_info=True)
                continue
            news = set(draining) - roster.draining
            roster.draining = frozenset(draining)
            for node in news:
                self._journal.log(NodeDraining(node, draining[node]))
            if news:
                self._members.desk.tell_all("checkpoint")
                if not self._plan.config.parallel.splits:
                    self._members.save()
            for member in [m for m in roster.everyone if alive and m.node not in alive]:
                self._members.lose(member.id, "node_lost", f"Ray lost node {member.node}")
            await self._journal.settle(self._watch.reachable)
            if self._journal.problem:
                self._fail(self._journal.problem, 1, "storage_error")
            await self.status()
            self._faults.start()

    def _note_phase(self, status: Status) -> None:
        """Write down what the run is about when that changes, for those who watch from elsewhere."""
        now = PhaseBegan(status.phase, status.joined, status.missing)
        if now != self._noted and not self._outcome:
            self._journal.log(now)
        self._noted = now

    def _is_taken_over(self) -> bool:
        if self._journal.check_owner():
            self._end("failed", "another command has taken this run over", 1)
        return self._journal.superseded

    async def status(self) -> Status:
        """What there is to show."""
        self._is_taken_over()  # workers that never come do not tell
        roster = self._members.roster
        rate, steps_rate = self._journal.pace.rates()
        phase, missing = self._phase, roster.missing()
        if not (self._members.begun and roster.training) and not self._outcome:
            phase = "regrouping" if roster.generation else "loading data and model"
            if missing:
                phase = "waiting for workers"
        found = Status(
            joined=len(roster.seated) + len(roster.ready), workers=len(roster.seated), missing=missing,
            generation=roster.generation, step=self._journal.recorded, loss=self._journal.loss,
            samples_per_s=rate, steps_per_s=steps_rate, phase=phase, outcome=self._outcome, message=self._message,
            exit_status=self._exit_status, result=self._journal.result, notice=self._journal.devices.notice,
        )  # fmt: skip
        self._note_phase(found)  # from the command's first question on, whether workers come or not
        return found
