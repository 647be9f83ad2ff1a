"""Ray Train's controller, with a worker group of ours (internals of Ray 2.60, which is why its version is pinned)."""

from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus

from orchestrator.worker_group import ElasticWorkerGroup

OVER_POLL_S = 0.05  # at the run's end nobody is looked after: how soon it is seen that the workers have left


class ElasticController(TrainController):  # type: ignore[misc]
    """See the module."""

    worker_group_cls = ElasticWorkerGroup

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        status = await super()._poll_workers()
        if self._worker_group.over:
            self._health_check_interval_s = OVER_POLL_S
        return status
