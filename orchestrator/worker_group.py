"""Ray Train's worker group, whose workers are replaced and added one by one while the others go on.

Ray Train restarts all workers when one is lost; with replica groups (TorchFT's way) it replaces the lost one, but
waits for it and looks after nobody meanwhile. Here a missing worker is an opening that fills itself: an actor is
asked for, and when Ray has found room for it, it is given its context and the train function. The run's coordinator,
not Ray Train, decides what a lost worker means. Internals of Ray 2.60, which is why its version is pinned.

A placement group finds room for the first workers, all at once and by its strategy; then it is removed and they are
plain actors on the nodes that it chose. A group that lost a node keeps Ray's head busy, with a whole core, until it
can be placed again (https://github.com/ray-project/ray/pull/65007), which may be all night.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util.placement_group import PlacementGroup

from orchestrator.errors import last_line
from orchestrator.halting import wait
from orchestrator.openings import Filled, Opening, tell_ended
from orchestrator.seats import NAMESPACE, OVER
from orchestrator.strict import allows, node_wanted, waits_in_vain

LIVED_S = 60.0  # a worker that ends sooner makes the next one wait
BACKOFF_S = (0.0, 1.0, 3.0, 10.0, 30.0)
# The same for one that raises: it may read much before it does, and a machine that lacks something stay all night.
RAISED_S, RAISED_BACKOFF_S = 300.0, (*BACKOFF_S, 60.0, 120.0)
UNHEARD_S = 300.0  # a process that does not answer for so long is stopped, or its machine cannot be reached
ANSWER_S = 0.02  # a coordinator with nothing else to do answers sooner
END_S = 5.0  # workers still there so long after the run's end are shut down
NO_START = (ray.exceptions.RayActorError, ray.exceptions.RuntimeEnvSetupError, ray.exceptions.OutOfMemoryError)
log = logging.getLogger("ray.train")


class ElasticWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """See the module."""

    _worker_group_state: Any
    _lost_starts = 0  # groups of the run that lost a worker when it was given the train function

    def _start_impl(self, builder: Any) -> None:
        self._start_first(builder)
        config = self._train_run_context.backend_config
        workers = self._worker_group_state.workers
        self._filled = [Filled(worker) for worker in workers]
        self._openings = [Opening() for _ in range(config.maximum - len(workers))]
        self._coordinator = ray.get_actor(config.coordinator, namespace=NAMESPACE)
        self._asked_over: Any = None
        self._over_s, self._next_rank = 0.0, len(workers)

    def _start_first(self, builder: Any) -> None:
        """The first workers start; where one is lost, Ray Train asks for all of them again, if told in its own way.

        Its own start does not tell of one that is lost when it is given the train function, or does not answer. Who is
        lost each time is no accident: as many are excused as the run may lose workers.
        """
        began_s = time.time()
        try:
            super()._start_impl(builder)
        except WorkerGroupStartupFailedError as error:
            self._worker_group_state = None  # as of a group that did not start, so that those who did are ended
            if isinstance(error.__cause__, NO_START):  # Ray Train would ask for them again for ever
                coordinator = ray.get_actor(self._train_run_context.backend_config.coordinator, namespace=NAMESPACE)
                tell_ended(coordinator, began_s, error.__cause__)
            raise
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self._worker_group_state = None
            ElasticWorkerGroup._lost_starts += 1
            if ElasticWorkerGroup._lost_starts > self._train_run_context.run_config.failure_config.max_failures:
                raise
            raise WorkerGroupStartupFailedError(f"a worker did not start: {last_line(error)}") from error

    def _init_train_context_on_workers(self, workers: list[Worker], sync_actor: Any, arguments: dict[str, Any]) -> None:
        """The controller, which workers only ask for Ray Train's checkpoints, is no actor."""
        asked = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in arguments.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(asked, timeout=UNHEARD_S)  # one may have stopped, and all others wait for this thread

    def __bool__(self) -> bool:
        """A group that has lost all its workers is one all the same: Ray Train asks by truth whether there is any."""
        return True

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        """Look after workers and openings; the controller only learns whether the run is over.

        Workers report to the coordinator, so there are no reports to hand on to Ray Train's callbacks.
        """
        for filled in self._filled:
            filled.ask()
        polls = [filled.poll for filled in self._filled]
        if polls:
            ray.wait(polls, num_returns=len(polls), timeout=timeout)
        running = [filled for filled in self._filled if self._lives(filled)]
        self._keep(running)
        if self._is_over():
            late = time.monotonic() - self._over_s > END_S
            self._cancel_openings()
            return self._tell(running=bool(running) and not late)
        self._tend_all()
        return self._tell(running=True)

    @property
    def over(self) -> bool:
        """Whether the coordinator has said that the run is over."""
        return bool(self._over_s)

    def _tell(self, running: bool) -> WorkerGroupPollStatus:
        self._latest_poll_status = WorkerGroupPollStatus(
            worker_statuses={0: WorkerStatus(running=running)}, worker_rank_to_replica_group_rank=None
        )
        return self._latest_poll_status

    def _is_over(self) -> bool:
        if self._over_s:
            return True
        self._asked_over = self._asked_over or self._coordinator.is_over.remote()
        if ray.wait([self._asked_over], timeout=ANSWER_S)[0]:
            asked, self._asked_over = self._asked_over, None
            try:
                self._over_s = time.monotonic() if ray.get(asked) else 0.0
            except ray.exceptions.RayError:
                log.warning("the run's coordinator does not answer", exc_info=True)
        return bool(self._over_s)

    def _lives(self, filled: Filled) -> bool:
        """Whether a worker goes on; one that does not leaves an opening behind."""
        if not ray.wait([filled.poll], timeout=0)[0]:
            if time.monotonic() - filled.asked_s < UNHEARD_S:
                return True
            self._vacate(filled, WorkerStatus(running=False, error=TimeoutError(f"no answer for {UNHEARD_S:.0f} s")))
            return False
        poll, filled.poll = filled.poll, None
        try:
            status: WorkerStatus = ray.get(poll)
        except Exception as error:
            status = WorkerStatus(running=False, error=error)
        if status.running and not status.error:
            return True
        self._vacate(filled, status)
        return False

    def _vacate(self, filled: Filled, status: WorkerStatus) -> None:
        metadata, lived_s = filled.worker.metadata, time.monotonic() - filled.since_s
        what = f"ended: {status.error}" if status.error else f"returned: {status.return_value}"
        log.info("worker process %d on node %s %s", metadata.pid, metadata.node_id, what)
        ray.kill(filled.worker.actor)
        if status.return_value == OVER:
            return
        if status.error:
            tell_ended(self._coordinator, time.time() - lived_s, status.error)
        raised = status.error is not None and not isinstance(status.error, (ray.exceptions.RayError, TimeoutError))
        soon = lived_s < (RAISED_S if raised else LIVED_S)
        self._open(filled.failures + 1 if status.error and soon else 0, RAISED_BACKOFF_S if raised else BACKOFF_S)

    def _open(self, failures: int, backoff_s: Sequence[float] = BACKOFF_S) -> None:
        """A worker is missing; after `failures` in a row the next one is asked for later."""
        wait_s = backoff_s[min(failures, len(backoff_s) - 1)]
        self._openings.append(Opening(failures, time.monotonic() + wait_s))

    def _keep(self, running: list[Filled]) -> None:
        self._filled = running
        workers = [filled.worker for filled in running]
        self._worker_group_state = dataclasses.replace(self._worker_group_state, workers=workers)

    def _tend_all(self) -> None:
        """One look at all openings."""
        for opening in list(self._openings):
            self._tend(opening)

    def _tend(self, opening: Opening) -> None:
        """One look at an opening, without waiting for anything that takes long."""
        if opening.actor is None:
            if time.monotonic() >= opening.not_before_s:
                self._ask(opening)
            return
        if not ray.wait([opening.asked], timeout=0)[0]:
            if waits_in_vain(self._worker_group_context.placement_strategy, self._nodes, opening.node):
                ray.kill(opening.actor)
                opening.actor = None
            return
        self._openings.remove(opening)
        try:
            self._fill(opening)
        except Exception as error:
            log.warning("a new worker did not start", exc_info=True)
            tell_ended(self._coordinator, opening.asked_s, error)
            ray.kill(opening.actor)
            self._open(opening.failures + 1)

    def _ask(self, opening: Opening) -> None:
        """Ask Ray for a process; it comes when there is room, which the autoscaler may have to make."""
        context, scaling = self._worker_group_context, self._train_run_context.scaling_config
        labels = (scaling._label_selector_per_worker(1) or [{}])[0]
        opening.node = node_wanted(context.placement_strategy, self._nodes)
        labels = {**labels, **({RAY_NODE_ID_KEY: opening.node} if opening.node else {})}
        opening.actor = self._actor(labels, "SPREAD" if "SPREAD" in context.placement_strategy else "DEFAULT")
        opening.asked, opening.asked_s = opening.actor.get_metadata.remote(), time.time()

    def _actor(self, labels: dict[str, str], strategy: str) -> Any:
        """A worker's actor, on a node with these labels."""
        context = self._train_run_context
        environment: Any = {}  # none at all: Ray need not set one up, a quarter of a second of a core for each worker
        if not context.backend_config.inherits:
            environment = {"runtime_env": self._get_worker_runtime_env(context.run_config.worker_runtime_env)}
        resources = bundle_to_remote_args(self._worker_group_context.resources_per_worker)
        actor_class: Any = ray.remote(**environment, **resources)(self._worker_cls)
        return actor_class.options(label_selector=labels, scheduling_strategy=strategy).remote()

    def _room(self, placement_group: PlacementGroup) -> list[str]:
        """The node for each worker, as the group has found it; the group is not needed any more."""
        nodes = ray.util.placement_group_table(placement_group)["bundles_to_node_id"]
        ray.util.remove_placement_group(placement_group)
        return [nodes[number] for number in range(len(nodes))]

    def _create_placement_group(self, *arguments: Any) -> Any:
        """Ray Train's, whose wait ends when the command does."""
        handle = super()._create_placement_group(*arguments)
        whole = handle.wait
        handle.wait = lambda timeout_s: wait(whole, timeout_s)
        return handle

    def _create_workers(
        self, num_workers: int, placement_group: PlacementGroup, resources_per_worker: Any, **_: Any
    ) -> list[Worker]:
        """The first workers, as plain actors where the placement group has found room."""
        nodes = self._room(placement_group)
        actors = [self._actor({RAY_NODE_ID_KEY: nodes[number]}, "DEFAULT") for number in range(num_workers)]
        try:
            # Somebody else may have taken the room, or a node may have gone.
            asked = [a.get_metadata.remote() for a in actors]
            there = lambda timeout_s: not ray.wait(asked, num_returns=len(asked), timeout=timeout_s)[1]  # noqa: E731
            wait(there, self._worker_group_start_timeout_s)
            found = ray.get(asked, timeout=0)
        except ray.exceptions.RayError as error:
            for actor in actors:
                ray.kill(actor)
            raise WorkerGroupStartupFailedError(f"a worker did not start: {error}") from error
        workers = [
            Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=number)
            for number, (actor, metadata) in enumerate(zip(actors, found, strict=True))
        ]
        return list(self._assign_worker_ranks(workers, 0, num_workers, 1))

    @property
    def _nodes(self) -> set[str]:
        """Where workers are."""
        return {filled.worker.metadata.node_id for filled in self._filled}

    def _fill(self, opening: Opening) -> None:
        """The process is there: give it its context and the train function."""
        resources = self._worker_group_context.resources_per_worker
        worker = Worker(opening.actor, ray.get(opening.asked), resources, placement_group_bundle_index=0)
        if not allows(self._worker_group_context.placement_strategy, self._nodes, worker.metadata.node_id):
            ray.kill(opening.actor)
            return self._open(0)
        self._next_rank += 1  # Ray Train's number of the process; the run's ranks are the coordinator's
        self._assign_worker_ranks([worker], self._next_rank - 1, self._next_rank, 1)
        self._init_train_context([worker], self._worker_group_state.sync_actor)
        # In the group before it starts: Ray Train's callbacks take a group without workers for none at all.
        self._keep([*self._filled, Filled(worker, opening.failures)])
        group = ReplicaGroup([worker], resources, self._replica_group_callbacks)
        try:
            group.start_training(self._worker_group_context)
        except Exception:
            self._keep(self._filled[:-1])
            raise
        log.info("started worker process %d on node %s", worker.metadata.pid, worker.metadata.node_id)

    def _cancel_openings(self) -> None:
        for opening in self._openings:
            if opening.actor is not None:
                ray.kill(opening.actor)
        self._openings = []

    def shutdown(self) -> None:
        """See WorkerGroup."""
        self._cancel_openings()
        super().shutdown()
