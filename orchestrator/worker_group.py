"""Ray Train's worker group, whose workers are replaced and added one by one while the others go on.

Ray Train restarts all workers when one is lost; with replica groups (TorchFT's way) it replaces the lost one, but
waits for it and looks after nobody meanwhile. Here a missing worker is an opening that fills itself: an actor is
asked for, and when Ray has found room for it, it is given its context and the train function. The run's coordinator,
not Ray Train, decides what a lost worker means. Internals of Ray 2.60, which is why its version is pinned.
"""

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.seats import LEFT, NAMESPACE, OVER
from orchestrator.watch import NodeWatch

LIVED_S = 60.0  # a worker that ends sooner makes the next one wait
BACKOFF_S = (0.0, 1.0, 3.0, 10.0, 30.0)
END_S = 5.0  # workers still there so long after the run's end are shut down
log = logging.getLogger("ray.train")


@dataclass
class Opening:
    """A worker that is missing.

    Attributes:
        bundle: its place in the placement group; None: any room in the cluster, beyond the first gang.
        failures: workers in a row that ended here soon.
        not_before_s: monotonic time before which nobody is asked for.
        home: a bundle on a node that is being drained. It moves when that node is gone, perhaps to the room that is
            asked for: then it is used.
        actor, asked: the one that is awaited.
    """

    bundle: int | None
    failures: int = 0
    not_before_s: float = 0.0
    home: int | None = None
    actor: Any = None
    asked: Any = None


@dataclass
class Filled:
    """A worker that was started, when, and what its place is."""

    worker: Worker
    bundle: int | None
    failures: int
    since_s: float = field(default_factory=time.monotonic)
    poll: Any = None


class ElasticWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """See the module."""

    _worker_group_state: Any

    def _start_impl(self, builder: Any) -> None:
        super()._start_impl(builder)
        config = self._train_run_context.backend_config
        workers = self._worker_group_state.workers
        self._filled = [Filled(worker, worker.placement_group_bundle_index, 0) for worker in workers]
        self._openings = [Opening(None) for _ in range(config.maximum - len(workers))]
        self._coordinator = ray.get_actor(config.coordinator, namespace=NAMESPACE)
        self._asked_over: Any = None
        self._over_s = 0.0
        self._next_rank = len(workers)
        self._watch = NodeWatch()

    def __bool__(self) -> bool:
        """A group that has lost all its workers is one all the same: Ray Train asks by truth whether there is any."""
        return True

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        """Look after workers and openings; the controller only learns whether the run is over.

        Workers report to the coordinator, so there are no reports to hand on to Ray Train's callbacks.
        """
        for filled in self._filled:
            filled.poll = filled.poll or filled.worker.actor.poll_status.remote()
        polls = [filled.poll for filled in self._filled]
        if polls:
            ray.wait(polls, num_returns=len(polls), timeout=timeout)
        running = [filled for filled in self._filled if self._lives(filled)]
        self._keep(running)
        if self._is_over():
            late = time.monotonic() - self._over_s > END_S
            self._cancel_openings()
            return self._tell(running=bool(running) and not late)
        for opening in list(self._openings):
            self._tend(opening)
        return self._tell(running=True)

    def _tell(self, running: bool) -> WorkerGroupPollStatus:
        self._latest_poll_status = WorkerGroupPollStatus(
            worker_statuses={0: WorkerStatus(running=running)}, worker_rank_to_replica_group_rank=None
        )
        return self._latest_poll_status

    def _is_over(self) -> bool:
        if self._over_s:
            return True
        self._asked_over = self._asked_over or self._coordinator.is_over.remote()
        if ray.wait([self._asked_over], timeout=0)[0]:
            asked, self._asked_over = self._asked_over, None
            try:
                self._over_s = time.monotonic() if ray.get(asked) else 0.0
            except ray.exceptions.RayError:
                log.warning("the run's coordinator does not answer", exc_info=True)
        return bool(self._over_s)

    def _lives(self, filled: Filled) -> bool:
        """Whether a worker goes on; one that does not leaves an opening behind."""
        if not ray.wait([filled.poll], timeout=0)[0]:
            return True
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
        failures = filled.failures + 1 if status.error and lived_s < LIVED_S else 0
        wait_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
        opening = Opening(filled.bundle, failures, time.monotonic() + wait_s)
        if status.return_value == LEFT:
            opening.bundle, opening.home = None, filled.bundle
        self._openings.append(opening)

    def _keep(self, running: list[Filled]) -> None:
        self._filled = running
        workers = [filled.worker for filled in running]
        self._worker_group_state = dataclasses.replace(self._worker_group_state, workers=workers)

    def _tend(self, opening: Opening) -> None:
        """One look at an opening, without waiting for anything that takes long."""
        if opening.actor is None:
            if time.monotonic() >= opening.not_before_s:
                self._ask(opening)
            return
        if not ray.wait([opening.asked], timeout=0)[0]:
            if opening.home is not None and self._has_moved(opening.home):
                ray.kill(opening.actor)
                opening.bundle, opening.home, opening.actor = opening.home, None, None
            return
        self._openings.remove(opening)
        try:
            self._fill(opening)
        except Exception:
            log.warning("a new worker did not start", exc_info=True)
            ray.kill(opening.actor)
            failures = opening.failures + 1
            wait_s = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
            self._openings.append(Opening(opening.bundle, failures, time.monotonic() + wait_s))

    def _has_moved(self, bundle: int) -> bool:
        """Whether a bundle of the placement group lies on a node that stays."""
        group = self._worker_group_state.placement_group_handle.placement_group
        node = ray.util.placement_group_table(group)["bundles_to_node_id"].get(bundle, "")
        alive, draining = self._watch.look()
        return node in alive and node not in draining

    def _ask(self, opening: Opening) -> None:
        """Ask Ray for a process; it comes when there is room, which the autoscaler may have to make."""
        context, scaling = self._worker_group_context, self._train_run_context.scaling_config
        options: dict[str, Any] = {}
        if opening.bundle is not None:
            group = self._worker_group_state.placement_group_handle.placement_group
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=opening.bundle
            )
        else:
            labels = (scaling._label_selector_per_worker(1) or [{}])[0]
            options["label_selector"] = {**labels, **self._apart_or_together(context.placement_strategy)}
            options["scheduling_strategy"] = "SPREAD" if "SPREAD" in context.placement_strategy else "DEFAULT"
        environment = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
        resources = bundle_to_remote_args(context.resources_per_worker)
        actor_class: Any = ray.remote(runtime_env=environment, **resources)(self._worker_cls)
        opening.actor = actor_class.options(**options).remote()
        opening.asked = opening.actor.get_metadata.remote()

    def _apart_or_together(self, strategy: str) -> dict[str, str]:
        """The node label that a strict placement asks for, given where the others are."""
        nodes = sorted({filled.worker.metadata.node_id for filled in self._filled})
        if not nodes or not strategy.startswith("STRICT"):
            return {}
        return {RAY_NODE_ID_KEY: f"!in({','.join(nodes)})" if strategy == "STRICT_SPREAD" else nodes[0]}

    def _fill(self, opening: Opening) -> None:
        """The process is there: give it its context and the train function."""
        resources = self._worker_group_context.resources_per_worker
        worker = Worker(
            opening.actor, ray.get(opening.asked), resources, placement_group_bundle_index=opening.bundle or 0
        )
        self._next_rank += 1  # Ray Train's number of the process; the run's ranks are the coordinator's
        self._assign_worker_ranks([worker], self._next_rank - 1, self._next_rank, 1)
        self._init_train_context([worker], self._worker_group_state.sync_actor)
        # In the group before it starts: Ray Train's callbacks take a group without workers for none at all.
        self._keep([*self._filled, Filled(worker, opening.bundle, opening.failures)])
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


class ElasticController(TrainController):  # type: ignore[misc]
    """Ray Train's controller with such a worker group."""

    worker_group_cls = ElasticWorkerGroup
