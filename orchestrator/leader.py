"""Ray Train's controller, with a worker group of ours (internals of Ray 2.60, which is why its version is pinned)."""

from typing import Any

from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus

from orchestrator.halting import check
from orchestrator.worker_group import ElasticWorkerGroup

OVER_POLL_S = 0.05  # at the run's end nobody is looked after: how soon it is seen that the workers have left


class _NoBarrier:
    """Instead of Ray Train's actor for barriers between workers that report(): ours do not, and it costs a process."""

    def options(self, **_: Any) -> "_NoBarrier":
        return self

    def remote(self, **_: Any) -> str:
        return "no barrier"


worker_group.SynchronizationActor = _NoBarrier()
state._shutdown_sync_actor = lambda _: None


class ElasticController(TrainController):  # type: ignore[misc]
    """See the module."""

    worker_group_cls = ElasticWorkerGroup

    async def _run_control_loop_iteration(self) -> None:
        check()
        await super()._run_control_loop_iteration()

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        status = await super()._poll_workers()
        if self._worker_group.over:
            self._health_check_interval_s = OVER_POLL_S
        return status
