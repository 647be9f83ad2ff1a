"""A worker of --sync parameter-server: pull parameters, compute the microbatch it is given, push the gradient."""

import logging
import os
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from orchestrator.handout import Unit
from orchestrator.nodewatch import actor_lost
from orchestrator.recovery import Member
from orchestrator.seats import LEFT, OVER, Order
from orchestrator.served import Done, Job, Posting
from orchestrator.wire import Asked, Pipe
from orchestrator.worker import GivenUpError, Worker, train_worker
from orchestrator.worker_device import take_device

AGAIN_S = 0.5  # until a server is tried again that this worker alone does not reach
FRESH_S = 0.05  # parameters that came with the answer to a push are pulled again after so long
log = logging.getLogger("orchestrator.worker")


class EraOverError(RuntimeError):
    """The servers were put back to a checkpoint, or one is lost: what this worker was doing is void."""


def train_served_worker(task: dict[str, Any]) -> str:
    """See train_worker."""
    return train_worker(task, ServedWorker)


class ServedWorker(Worker):
    """One worker process; it belongs to no generation."""

    def __init__(self, task: dict[str, Any], coordinator: Any) -> None:
        super().__init__(task, coordinator)
        self._posting: Posting | None = None
        self._unit: Unit | None = None
        self._dragged_at = -1
        self._versions: list[int] = []
        self._pipes: list[Pipe] = []
        self._pulled_s, self._synchronous = 0.0, True
        self._microbatches: Any = None
        self._exchange_s = 0.0

    @property
    def rank(self) -> int:
        """That of its posting; -1: it has none."""
        return self._posting.rank if self._posting else -1

    @property
    def step(self) -> int:
        return self._unit.step if self._unit else 0

    def close(self) -> None:
        """Hang up."""
        self._disconnect()
        if self._microbatches is not None:
            self._microbatches.close()
        super().close()

    def _disconnect(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []

    def run(self) -> str:
        """From the first line to the last."""
        self._connect_line()
        from orchestrator.build import build_state, check_same_data, prepare_torch, settle_loader
        from orchestrator.devices import kind_of
        from orchestrator.group import Group
        from orchestrator.microbatch import Microbatches, is_synchronous
        from orchestrator.samefolder import check_same_storage
        from orchestrator.server_part import split
        from workloads.registry import WORKLOADS

        prepare_torch(self._plan.config.threads, same_bits=True)
        device, _ = take_device(self._plan.config)
        self._workload = WORKLOADS[self._plan.workload].build(self._plan.config)
        check_same_data(self._plan, self._workload, self._host)
        check_same_storage(self._task["uri"], self._task["token"], self._host, self._plan.config.storage_patience)
        self._plan = settle_loader(self._plan, self._workload)
        self._state = build_state(self._plan, self._workload, device)
        self._group = Group(0, 1, device, waiting=True, drag=self._saboteur.drag)
        parts = split(self._plan, self._state)
        self._microbatches = Microbatches(self._plan, self._workload, self._state, self._group, parts)
        self._synchronous = is_synchronous(self._plan)
        while True:
            answer = self._attach(kind_of(device))
            if isinstance(answer, Order):
                return self._obey(answer)
            self._posting, self._versions, self._pulled_s = answer, [-1] * len(parts), 0.0
            try:
                self._connect()
                return self._obey(self._serve())
            except EraOverError as error:
                log.warning("after step %d: %s", self.step, error)
            finally:
                self._disconnect()

    def _connect(self) -> None:
        """A pipe to each server; raises EraOverError if one is lost."""
        assert self._posting is not None
        addresses = self._ask([server.address.remote() for server in self._posting.servers])
        try:
            for address in addresses:
                self._pipes.append(Pipe(*address))
        except OSError as error:
            self._miss(error)

    def _attach(self, device: str) -> Posting | Order:
        """Ask until a dispatcher answers: it may have been restarted."""
        import ray

        while True:
            if self._line_broke:
                self._connect_line()
            member = Member(self.id, self._node, os.getpid(), device, 0, self.rank, ("", 0), self._host, self._speed)
            try:
                with self._group.others_wait():
                    answer: Posting | Order = ray.get(self._coordinator.attach.remote(member))
                return answer
            except ray.exceptions.RayError:
                log.exception("the dispatcher was lost; waiting for it to come back")
                self._line_broke = True

    def _serve(self) -> Order:
        """Do what comes until there is something else than a job to do; raises EraOverError."""
        done: Done | None = None
        while True:
            if self._line_broke:
                raise EraOverError("the line to the dispatcher broke")
            job = self._turn(done)
            if isinstance(job, Order):
                if job.word == "attach":
                    raise EraOverError("the dispatcher has begun anew")
                return job
            done = None
            if job.unit is not None:
                done = self._compute(job, job.unit)
            elif job.kind == "evaluate":
                self._evaluate(job)
            else:
                self._finish(job)

    def _turn(self, done: Done | None) -> Job | Order:
        import ray

        assert self._posting is not None
        with self._group.others_wait():
            try:
                answer: Job | Order = ray.get(self._coordinator.turn.remote(self.id, self._posting.era, done))
                return answer
            except ray.exceptions.RayError as error:
                self._line_broke = True
                raise EraOverError(f"the dispatcher was lost: {error}") from error

    def _compute(self, job: Job, unit: Unit) -> Done:
        """One microbatch: its samples, the newest parameters, its gradient; returns when all servers have that."""
        assert self._posting is not None
        self._unit = unit
        if unit.step != self._dragged_at:
            self._dragged_at = unit.step
            self._saboteur.before_step(self.rank, job.workers, job.step, self._plan.config.shards)
        started = time.perf_counter()
        fed = self._microbatches.read(unit)
        read_s = time.perf_counter() - started
        self._exchange_s = 0.0
        if self._synchronous or time.perf_counter() - self._pulled_s > FRESH_S:
            self._pull()
        self._group.step_on()
        computed = self._microbatches.compute(unit, read_s, fed)
        era, nothing = self._posting.era, computed.statistics[:0]
        stale = self._exchange(
            Asked(
                era, version, unit.step, unit.shard, computed.samples, gradient, nothing if n else computed.statistics
            )
            for n, (version, gradient) in enumerate(zip(self._versions, computed.gradients, strict=True))
        )
        return Done(
            unit,
            computed.loss,
            computed.count,
            computed.samples,
            computed.ledger,
            stale,
            computed.data_s,
            computed.compute_s,
            self._exchange_s,
        )

    def _pull(self) -> None:
        """Take over the newest parameters."""
        assert self._posting is not None
        self._exchange(Asked(self._posting.era, version) for version in self._versions)

    def _exchange(self, asked: Iterable[Asked]) -> int:
        """Ask every server, and take over the parameters that have changed; returns the largest staleness.

        Raises:
            EraOverError: a server is of another era, or lost.
        """
        started, stale = time.perf_counter(), 0
        with self._group.others_wait():
            try:
                for pipe, wanted in zip(self._pipes, asked, strict=True):
                    pipe.ask(wanted)
                for server, pipe in enumerate(self._pipes):
                    answer = pipe.answer(self._microbatches.landing(server))
                    if answer is None:
                        raise EraOverError("the servers were put back to a checkpoint")
                    stale, self._versions[server] = max(stale, answer.stale), answer.version
                    if answer.parameters is not None:
                        self._microbatches.landed(server)
            except OSError as error:
                self._miss(error)
        self._pulled_s = time.perf_counter()
        self._exchange_s += self._pulled_s - started
        return stale

    def _miss(self, error: Exception) -> NoReturn:
        """A server does not answer: the dispatcher looks into it. Raises EraOverError."""
        import ray

        assert self._posting is not None
        with self._group.others_wait():
            try:
                if ray.get(self._coordinator.server_missed.remote(self._posting.era, self.id, str(error))):
                    time.sleep(AGAIN_S)
            except ray.exceptions.RayError:
                self._line_broke = True
        raise EraOverError(f"a server was lost: {error}") from error

    def _ask(self, references: list[Any]) -> list[Any]:
        """The servers' answers; raises EraOverError if they are of another era, or one is lost."""
        import ray

        with self._group.others_wait():
            try:
                answers: list[Any] = ray.get(references)
            except actor_lost() as error:
                self._miss(error)
        if any(answer is None for answer in answers):
            raise EraOverError("the servers were put back to a checkpoint")
        return answers

    def _evaluated(self) -> dict[str, float]:
        """The held-out metrics of the newest parameters."""
        from orchestrator.evaluate import evaluate

        assert self._posting is not None
        self._pull()
        (buffers,) = self._ask([self._posting.servers[0].buffers.remote(self._posting.era)])
        self._microbatches.place_buffers(buffers)
        processes = self._plan.config.loader_processes
        return evaluate(self._workload, self._state.model, self._state.precision, self._group, processes)

    def _evaluate(self, job: Job) -> None:
        self._told_dispatcher(self._coordinator.evaluated.remote(job.step, self._evaluated()))

    def _finish(self, job: Job) -> None:
        from orchestrator.recorder import save_trained
        from orchestrator.state import weights_sha256

        metrics = self._evaluated()
        self._state.step = job.step
        self._state.check_finite()
        with self._group.others_wait(), self._group.clock.away():
            save_trained(self._plan, self._task["uri"], self._workload, self._state.model)
        told = self._coordinator.finish.remote(self.id, 0, weights_sha256(self._state.model), metrics)
        self._told_dispatcher(told)

    def _told_dispatcher(self, reference: Any) -> None:
        """Until it has taken it; raises EraOverError if it is lost: its successor gives work out anew."""
        import ray

        try:
            ray.get(reference)
        except actor_lost() as error:
            self._line_broke = True
            raise EraOverError(f"the dispatcher was lost: {error}") from error

    def _obey(self, order: Order) -> str:
        if order.word == "excluded":
            raise GivenUpError("the dispatcher has given this worker up")
        return LEFT if order.word == "leave" else OVER
