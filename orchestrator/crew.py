"""The parameter servers of a run, as the dispatcher sees them: started, put back to a checkpoint, asked and missed."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import UserError
from orchestrator.nodewatch import actor_lost, end_process
from orchestrator.plan import Plan
from orchestrator.served import Restored
from orchestrator.server import Server

WRITTEN_S = 0.1  # between questions whether a checkpoint is whole
SILENT_S = 60.0  # a server that is there but does not answer for so long is lost
log = logging.getLogger("orchestrator.crew")


class Crew:
    """Actors over the cluster, a node each where there are as many; they reserve nothing.

    Attributes:
        era: counts how often they were put back.
        handles: of the actors, in the order of their parameters.
    """

    def __init__(self, plan: Plan, uri: str, token: str, loopback: bool) -> None:
        """Args:
        uri, token: of the run's folder, see check_same_storage.
        loopback: whether all workers are on this machine.
        """
        self._plan, self._folder, self._loopback = plan, (uri, token), loopback
        self.era = 0
        self._asked: Any = None  # the newest checkpoint, until it has begun to be written
        self.handles: list[Any] = []

    def _start(self, number: int, nodes: Sequence[str] = ()) -> Any:
        import ray
        from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]

        anywhere = dict(self._plan.config.node_labels.items)
        where = {**anywhere, RAY_NODE_ID_KEY: f"in({','.join(nodes)})"} if nodes else anywhere
        actor_class: Any = ray.remote(Server).options(
            num_cpus=0,
            scheduling_strategy="SPREAD",
            label_selector=where or None,
            fallback_strategy=[{"label_selector": {**anywhere, RAY_NODE_ID_KEY: "!none"}}] if nodes else None,
            max_restarts=0,
        )
        dispatcher = ray.get_runtime_context().current_actor
        return actor_class.remote(self._plan, *self._folder, number, dispatcher, self._loopback)

    async def stand(self, limit_s: float, nodes: Sequence[str]) -> Restored:
        """Replace the servers that are missing, and put all to the newest checkpoint.

        Args:
            limit_s: for a server that is there to load the checkpoint.
            nodes: where those that are replaced shall be; none: anywhere.

        Raises:
            UserError: they cannot begin with these settings.
            RayError: one is lost meanwhile.
            TimeoutError: one is not ready in time.
        """
        if not self.handles:
            self.handles = [self._start(number) for number in range(self._plan.config.servers)]
        else:
            for number in await self.missing():
                self.end(number)
                self.handles[number] = self._start(number, nodes)
        self.era, self._asked = self.era + 1, None
        first = await self._restored(0, None, limit_s)
        others = [] if first.problem else range(1, len(self.handles))
        for restored in (first, *await asyncio.gather(*(self._restored(n, first.step, limit_s) for n in others))):
            if restored.problem:
                raise UserError(restored.problem)
        return first

    async def _restored(self, number: int, step: int | None, limit_s: float) -> Restored:
        """One server; one that is there, and is not ready in time, is ended."""
        await self.handles[number].address.remote()  # data may have to be made, a machine to come
        try:
            found: Restored = await asyncio.wait_for(self.handles[number].restore.remote(self.era, step), limit_s)
        except TimeoutError:
            self.end(number)
            raise
        return found

    async def missing(self) -> list[int]:
        """Numbers of the servers that do not answer; raises what one says is wrong with it."""

        pings = [asyncio.wait_for(handle.ping.remote(), SILENT_S) for handle in self.handles]
        answers = await asyncio.gather(*pings, return_exceptions=True)
        lost = []
        for number, answer in enumerate(answers):
            if isinstance(answer, (TimeoutError, *actor_lost())):
                log.warning("server %d does not answer: %s", number, answer)
                lost.append(number)
            elif isinstance(answer, BaseException):
                raise answer
        return lost

    def end(self, number: int) -> None:
        """Kill a server's process."""
        import ray

        ray.kill(self.handles[number])

    async def strike(self, number: int) -> str:
        """SIGKILL to a server, for a rehearsal; returns why that is impossible, or ""."""
        import ray

        try:
            await end_process(*await self.handles[number].place.remote())
        except (IndexError, ray.exceptions.RayError) as error:
            return f"server {number}: {type(error).__name__}"
        return ""

    async def commit(self, step: int, count: float) -> None:
        """All servers have a step's gradients, of so many items: they take the step. Raises RayError."""
        norms = [handle.sum_up.remote(step, count) for handle in self.handles]
        clip = norms if self._plan.config.clip_norm else []  # Ray hands the servers what the others answered
        await asyncio.gather(*[handle.apply.remote(step, *clip) for handle in self.handles])

    def checkpoint(self, step: int) -> None:
        """Ask for a checkpoint of the parameters as they are now; Server calls the dispatcher's `saved` when it is."""
        parts = [handle.snapshot.remote() for handle in self.handles]
        self._asked = self.handles[0].write.remote(step, *parts)

    async def taken(self) -> None:
        """Until all servers have given their parts of the last checkpoint; raises RayError where one has not."""
        if self._asked is not None:
            await self._asked

    async def written(self) -> None:
        """Until the last checkpoint is whole; raises why it is not: a server may be lost before it gave its part."""
        await self.taken()
        while not await self.handles[0].written.remote():
            await asyncio.sleep(WRITTEN_S)

    async def weights_sha256(self) -> str:
        """Of the model as it is now; raises RayError."""
        parts = [handle.snapshot.remote() for handle in self.handles]
        sha256: str = await self.handles[0].weights_sha256.remote(*parts)
        return sha256
