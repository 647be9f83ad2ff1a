"""The dispatcher's care for its servers: they are started, put back when one is lost, and written to checkpoints."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.coordinator import Coordinator
from orchestrator.crew import Crew
from orchestrator.crowd import Crowd
from orchestrator.errors import OrchestratorError
from orchestrator.events import CheckpointSaved
from orchestrator.failure import Failure, kind_of
from orchestrator.handout import Handout
from orchestrator.nodewatch import actor_lost
from orchestrator.seats import Assignment
from orchestrator.served import Restored

LOOK_S = 1.0
RESTORE_S = 600.0  # for a server that answers to take the checkpoint over
MOST_NODES = 100  # that are named to Ray
MISSES = 5  # of a server that is there, until the worker is given up


class Keeper(Coordinator):
    """A coordinator with servers; what is handed out is the dispatcher's."""

    members_kind = Crowd
    _members: Crowd

    def __init__(self, assignment: Assignment) -> None:
        super().__init__(assignment)
        self._crew = Crew(self._plan, assignment.uri, assignment.token, assignment.loopback)
        self._faults.end_server = self._crew.strike
        self._handout: Handout | None = None  # None: the servers are not ready
        self._saving, self._recovering = False, False
        self._saved_s, self._saved_step, self._servers_lost = time.monotonic(), -1, 0
        self._restore_s = RESTORE_S + 2 * self._plan.config.storage_patience
        self._misses: dict[str, int] = {}  # of a server, by workers that have finished nothing since

    def _restart(self, restored: Restored, load_s: float) -> None:
        """The servers are ready; loading took so many seconds."""
        raise NotImplementedError

    async def _stand(self) -> None:
        """Start what servers are missing and put all to the newest checkpoint, until that succeeds."""
        import ray

        gone: tuple[type[Exception], ...] = (TimeoutError, *actor_lost())
        while not self._outcome:
            started = time.perf_counter()
            try:
                restored = await self._crew.stand(self._restore_s, self._fit_nodes())
            except gone as error:
                self._miss_server(
                    (str(error) or f"a server was not ready within {self._restore_s:.0f} s").splitlines()[0]
                )
                continue
            except OrchestratorError as error:
                await self.fail(str(error), error.exit_status, str(error), kind_of(error))
                return
            except ray.exceptions.RayTaskError as error:
                await self._fail_for(error)
                return
            self._restart(restored, time.perf_counter() - started)
            return

    def _fit_nodes(self) -> list[str]:
        """Where servers can be that are started later: with workers, which have the data and see the storage."""
        roster = self._members.roster
        return sorted({member.node for member in roster.seated.values()} - roster.draining)[:MOST_NODES]

    def _checkpoint_if_due(self, steps: range) -> None:
        every = self._plan.config.checkpoint_every
        by_steps = every.steps and any((s + 1) % every.steps == 0 for s in steps)
        if by_steps or (every.seconds and time.monotonic() - self._saved_s >= every.seconds):
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Ask for one, unless one is being written or there is nothing new."""
        if self._saving or self._handout is None or self._handout.oldest <= self._saved_step:
            return
        before = self._saved_step
        self._saving, self._saved_s, self._saved_step = True, time.monotonic(), self._handout.oldest
        self._crew.checkpoint(self._saved_step)
        self._members.start(self._taken(self._crew.era, before))

    async def _taken(self, era: int, before: int) -> None:
        """The servers have handed their parts over; where one could not, and lives, the next checkpoint may be one."""
        import ray

        try:
            await self._crew.taken()
        except ray.exceptions.RayError as error:
            if era == self._crew.era and not self._outcome:
                self._journal.error(f"a checkpoint was not written: {error}")
                self._saving, self._saved_step = False, before
                await self._check_servers(era)

    async def saved(self, saved: dict[str, Any]) -> None:
        """The first server has written a checkpoint."""
        self._saving = False
        self._journal.log(CheckpointSaved(**saved))
        self._members.notify()

    async def _last_checkpoint(self, hashed: bool = False) -> str | None:
        """Have what there is written down; None: a server was lost, or it cannot be written.

        Returns:
            The hash of the weights in it, if asked for; else "".
        """
        import ray

        era = self._crew.era
        try:
            await self._crew.written()
            self._saving = False
            self._checkpoint()
            await self._crew.written()
            sha256 = await self._crew.weights_sha256() if hashed else ""
        except ray.exceptions.RayError as error:
            await self._look_into(error, era)
            return None
        return sha256 if era == self._crew.era else None

    async def _look_after_servers(self) -> None:
        while not self._outcome:
            await asyncio.sleep(LOOK_S)
            if self._handout is not None:
                await self._check_servers(self._crew.era)

    async def _look_into(self, error: Exception, era: int) -> None:
        """What was asked of the servers failed: because one is lost, or the run cannot go on."""
        await self._check_servers(era)
        if era != self._crew.era or self._recovering or self._outcome:
            return
        if isinstance(error, actor_lost()):  # it lives, but nobody knows whether it has done what it was asked
            await self._go_back(str(error).splitlines()[0])
        else:
            await self._fail_for(error)

    async def _fail_for(self, error: Exception) -> None:
        """What a server, or what was asked of it, says of why the run cannot go on."""
        cause = getattr(error, "cause", None) or error
        kind = kind_of(cause) if isinstance(cause, OrchestratorError) else "ray_train"
        await self.fail(str(cause).splitlines()[0], 1, str(error), kind)

    async def server_missed(self, era: int, member_id: str, why: str) -> bool:
        """A worker could not reach a server; whether none is lost. Then, the fifth time, the worker is given up."""
        await self._check_servers(era)
        member = self._members.roster.seated.get(member_id)
        if member is None or era != self._crew.era or self._recovering or self._outcome:
            return False
        self._misses[member_id] = self._misses.get(member_id, 0) + 1
        if self._misses[member_id] >= MISSES:
            self._members.lose(member_id, "worker_unreachable", f"servers that answer others do not answer it: {why}")
            self._members.kill(member)
        return True

    async def _check_servers(self, era: int) -> None:
        """If a server is lost, put all back to the newest checkpoint."""
        import ray

        try:
            lost = await self._crew.missing()
        except (ray.exceptions.RayError, OrchestratorError) as error:
            await self._fail_for(error)
            return
        if lost and era == self._crew.era and not self._recovering and not self._outcome:
            for number in lost:  # or who does not answer is waited for once more
                self._crew.end(number)
            await self._go_back(f"server {', '.join(map(str, lost))}: its process ended or does not answer")

    async def _go_back(self, detail: str) -> None:
        self._handout, self._recovering = None, True
        self._members.roster.training = False
        self._miss_server(detail)
        self._members.notify()
        await self._stand()

    def _miss_server(self, detail: str) -> None:
        self._journal.break_off("server_lost", detail, len(self._members.roster.seated), 0.0)
        self._servers_lost += 1
        allowed = self._plan.config.max_incidents
        if self._servers_lost > allowed:
            reason = f"{self._servers_lost} servers were lost, and --max-incidents allows {allowed}"
            self._end_by_members(reason, "server_lost")

    def _end(
        self,
        outcome: str,
        message: str,
        exit_status: int,
        sha256: str = "",
        metrics: Mapping[str, float] | None = None,
        failure: Failure | None = None,
    ) -> None:
        import ray

        super()._end(outcome, message, exit_status, sha256, metrics, failure)
        for number in range(len(self._crew.handles)):
            with contextlib.suppress(ray.exceptions.RayError):
                self._crew.end(number)
