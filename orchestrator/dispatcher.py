"""The coordinator of --sync parameter-server: hands microbatches out, keeps count, and looks after the servers.

Workers come and go without waiting for each other. A lost worker's microbatches are handed out again; a server that
has taken one of them drops it the second time. A lost server puts all servers back to the newest checkpoint, and the
microbatches since then are handed out again: with staleness 0 the same bits follow.
"""

import time

from orchestrator.errors import OrchestratorError
from orchestrator.events import Evaluated, GenerationStarted
from orchestrator.handout import Counted, Handout
from orchestrator.keeper import Keeper
from orchestrator.recovery import Member
from orchestrator.seats import Assignment, Order, Status
from orchestrator.served import Done, Job, Posting, Restored
from orchestrator.stepbook import StepBook
from orchestrator.suspicion import Newcomers
from orchestrator.values import NO, Figures


class Dispatcher(Keeper):
    """See the module. An asyncio actor: methods never block."""

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(assignment)
        self._synchronous = not self._plan.config.staleness.steps
        self._book = StepBook(self._plan)
        self._asked, self._committing = False, False
        self._evaluation, self._evaluator = 0, ""  # after that many steps, and by whom
        self._ripe, self._finisher = False, ""  # whether the run may be finished, and by whom
        self._halting = False  # a stop is being written down
        self._turns: dict[str, int] = {}  # how often a worker has asked
        self._trained = False  # whether there were enough workers, when somebody came or left the last time
        self._recorded_s, self._draining = time.monotonic(), frozenset[str]()
        self._members.left, self._members.looked = self._left, self._look
        self._members.held = self._held_shards
        self._members.broken_s = float("inf")  # nobody has to come back from a generation

    async def status(self) -> Status:
        """See Coordinator; the driver's first question starts the servers."""
        if not self._asked:
            self._asked = True
            self._members.start(self._stand())
            self._members.start(self._look_after_servers())
        return await super().status()

    def _restart(self, restored: Restored, load_s: float) -> None:
        """The servers are ready: what is not in the checkpoint is handed out."""
        finished = Counted(self._plan.schedule.microbatches_in_step, max(0, restored.step))
        self._handout = Handout(finished, self._plan.total_steps, self._plan.config.staleness.steps)
        self._book.clear()
        self._committing = self._saving = self._recovering = self._ripe = self._halting = False
        self._evaluation, self._evaluator, self._finisher = self._evaluation_due(restored.step), "", ""
        self._recorded_s = self._saved_s = time.monotonic()
        self._saved_step = restored.step
        self._loaded = (max(load_s, 1e-6), list(restored.rejected))
        if self._members.begun:
            self._journal.go_back(max(0, restored.step))  # there may be too few workers for a generation
        self._regroup()
        if self._handout.complete:
            self._members.start(self._ripen())
        self._members.notify()

    def _evaluation_due(self, step: int) -> int:
        """The step after which to evaluate first: that of the checkpoint, if it was lost before it was; 0: none."""
        done = self._journal.newest("evaluated")
        return step if self._plan.evaluates_after(step) and (done is None or done["step"] != step) else 0

    def _regroup(self) -> None:
        """Who trains has changed: a new generation begins, with no barrier."""
        roster = self._members.roster
        roster.training = self._handout is not None and len(roster.seated) >= roster.minimum
        waited, self._trained = roster.training and not self._trained, roster.training
        if roster.training:  # as after a coordinator's generation has begun
            roster.gather, self._newcomers = False, Newcomers()
        if not roster.training or self._handout is None or self._outcome:
            return
        if waited:  # which is no part of a step
            self._recorded_s = time.monotonic()
        roster.generation += 1
        seated, shards = roster.by_rank, self._plan.config.shards
        ranges, nodes = [[0, shards] for _ in seated], [m.node for m in seated]
        kinds = [m.device for m in seated]
        where = (ranges, nodes, [m.pid for m in seated], kinds[0], kinds)
        started = GenerationStarted(roster.generation, self._handout.oldest, len(seated), *where)
        load_s, rejected = self._loaded
        self._loaded = (0.0, [])
        self._journal.generation_begins(started, load_s, load_s, rejected)
        self._members.begun, self._phase = True, "training"
        self._faults.begin()

    async def attach(self, member: Member) -> Posting | Order:
        """A worker is ready; answers when the servers are. What it held before is handed out again."""
        crowd = self._members
        if crowd.excluded(member.id):
            return Order("excluded")
        if member.id not in crowd.roster.seated:
            crowd.roster.join(member, time.time())
        async with crowd.changed:
            await crowd.changed.wait_for(lambda: self._outcome or self._handout is not None)
        if self._outcome or self._handout is None:
            return Order("over")
        if crowd.excluded(member.id):  # lost while it waited
            return Order("excluded")
        self._handout.take_back(member.id)
        self._evaluator = "" if self._evaluator == member.id else self._evaluator
        self._finisher = "" if self._finisher == member.id else self._finisher
        if member.id not in crowd.roster.seated:
            crowd.enter(member)
            self._regroup()
            crowd.notify()
        rank = crowd.roster.seated[member.id].rank
        return Posting(rank, self._crew.era, tuple(self._crew.handles))

    async def turn(self, member_id: str, era: int, done: Done | None) -> Job | Order:
        """A worker has done a microbatch, if any, and asks for more; answers when there is something."""
        late = era != self._crew.era or self._members.excluded(member_id)
        if done is not None and self._handout is not None and not late:
            self._misses.pop(member_id, None)
            if self._handout.finish(member_id, done.unit):
                self._book.add(done)
            await self._advance()
        number = self._turns[member_id] = self._turns.get(member_id, 0) + 1
        async with self._members.changed:
            while number == self._turns[member_id]:
                if (answer := self._next(member_id, era)) is not None:
                    return answer
                await self._members.changed.wait()
        return Order("attach")  # it has asked anew: nobody waits for this answer

    def _next(self, member_id: str, era: int) -> Job | Order | None:
        """What a worker does now; None: nothing yet."""
        roster = self._members.roster
        if self._outcome or self._members.excluded(member_id):
            return Order("over" if self._outcome else "excluded")
        member = roster.seated.get(member_id)
        if member is None or self._handout is None or era != self._crew.era:
            return Order("attach")
        if member.node in roster.draining:
            staying = sum(m.node not in roster.draining for m in roster.seated.values())
            if staying >= roster.minimum:
                self._members.let_go(member)
                return Order("leave")
        if self._committing or not roster.training:
            return None
        stopping = self._members.stopping and not self._handout.complete
        if self._evaluation and not stopping:
            if not self._evaluator:
                self._evaluator = member_id
                return self._job("evaluate", self._evaluation)
            if self._synchronous:
                return None
        if self._ripe and not self._finisher:
            self._finisher, self._phase = member_id, "evaluating and saving"
            return self._job("finish", self._handout.oldest)
        unit = self._handout.take(member_id, begin=not stopping)
        return Job("train", self._handout.oldest, len(roster.seated), unit) if unit else None

    def _job(self, kind: str, step: int) -> Job:
        return Job(kind, step, len(self._members.roster.seated))

    async def _advance(self) -> None:
        """A microbatch is finished, and with it perhaps a step, or several."""
        assert self._handout is not None
        new = range(self._journal.recorded, self._handout.oldest)
        if not new or self._committing:
            return
        if self._synchronous:
            self._committing = True
            self._members.start(self._commit(new[0]))
            return
        await self._record(new)

    async def _commit(self, step: int) -> None:
        """All gradients of a step are with the servers: they take it, and the next one may begin."""
        import ray

        era = self._crew.era
        try:
            await self._crew.commit(step, self._book.count(step))
        except ray.exceptions.RayError as error:
            await self._look_into(error, era)
            return
        if era == self._crew.era and self._handout is not None:
            await self._record(range(step, step + 1))
            self._committing = False
            self._members.notify()

    async def _record(self, steps: range) -> None:
        """Steps are complete: write them down, and do what is due after them."""
        assert self._handout is not None
        now, at, roster = time.time(), time.monotonic(), self._members.roster
        each_s, self._recorded_s = (at - self._recorded_s) / len(steps), at
        who = {"workers": len(roster.seated), "generation": roster.generation, "time_s": round(now, 3)}
        try:
            await self.report([self._book.close(step, each_s) | who for step in steps], [])
        except OrchestratorError as error:
            await self.fail(str(error), error.exit_status, str(error))
            return
        self._journal.figures["staleness"] = self._book.staleness()
        self._evaluation = max([self._evaluation, *(s + 1 for s in steps if self._plan.evaluates_after(s + 1))])
        self._checkpoint_if_due(steps)
        if self._handout.complete:
            self._members.start(self._ripen())
        self._members.notify()

    async def _ripen(self) -> None:
        """Every microbatch is done: one worker evaluates and saves, when the last checkpoint is whole."""
        if await self._last_checkpoint() is not None:
            self._ripe = True
            self._members.notify()

    def _look(self) -> None:
        """Ten times a second: a stop that was asked for, nodes that will go."""
        roster, handout = self._members.roster, self._handout
        # Servers are between two steps then, and what they write was not asked for before.
        if roster.draining != self._draining and not self._committing and not self._saving:
            self._draining = roster.draining
            self._checkpoint()
            self._members.notify()
        # Servers that are put back, perhaps on nodes that never come, have nothing newer than the last checkpoint.
        busy = self._outcome or self._committing or (self._recovering and handout is not None)
        busy = busy or self._ripe or self._halting
        if self._members.stopping and not busy and (handout is None or self._may_stop(handout)):
            self._halting = True
            self._members.start(self._stop())

    def _may_stop(self, handout: Handout) -> bool:
        """Steps that are begun are finished first, so that a checkpoint fits any number of servers."""
        roster = self._members.roster
        waiting = len(roster.seated) < roster.minimum  # nothing is handed out: what is begun would stay so
        return not handout.complete and not handout.holders and (waiting or handout.between_steps)

    async def _stop(self) -> None:
        if self._handout is None or not self._members.begun:
            if self._members.begun:  # servers are being put back: what came after the checkpoint is gone
                self._journal.go_back(max(0, self._journal.saved))
            self._end_by_members("")
        elif (sha256 := await self._last_checkpoint(hashed=True)) is not None:
            await self.stopped(self._handout.oldest, sha256)
        else:
            self._halting = False

    def _held_shards(self, member_id: str) -> range:
        held = sorted(unit.shard for unit in self._handout.held(member_id)) if self._handout else []
        return range(held[0], held[-1] + 1) if held else range(0)

    def _left(self, member_id: str) -> None:
        """A worker is gone: what it held, and what it was to do, is others' now."""
        if self._handout is not None:
            self._handout.take_back(member_id)
        self._evaluator = "" if self._evaluator == member_id else self._evaluator
        self._finisher = "" if self._finisher == member_id else self._finisher
        self._regroup()
        self._members.notify()

    async def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The evaluation that a worker was given is done."""
        self._journal.log(Evaluated(step, metrics))
        if step >= self._evaluation:
            self._evaluation = 0
        self._evaluator = ""
        if self._synchronous:  # nobody has trained meanwhile
            self._recorded_s = time.monotonic()
        self._members.notify()

    async def finish(self, member_id: str, generation: int, sha256: str, metrics: Figures, size: Figures = NO) -> bool:
        """The model is saved; see Coordinator."""
        if self._finisher == member_id:
            self._journal.log(Evaluated(self._plan.total_steps, dict(metrics)))
            self._end("finished", "", 0, sha256, metrics)
        return bool(self._outcome)
