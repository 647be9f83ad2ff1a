"""TorchTrainer.fit, in a thread: the main thread shows progress and takes signals."""

import asyncio
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from orchestrator.accelerators import Accelerator
from orchestrator.afterword import scratch_prefix
from orchestrator.halting import halted
from orchestrator.offer import Offer
from orchestrator.own_ray import MALLOC
from orchestrator.redact import redact
from orchestrator.seats import Assignment

GROUP_TIMEOUT_S = 3600.0  # lost and frozen workers are found by the coordinator, long before
log = logging.getLogger("orchestrator.training")
HALT_S = 8.0  # some times as long as it takes to see that it shall, and to ask the autoscaler for nothing more


def coordinator_name(uri: str) -> str:
    """Name of the coordinator's actor, by the run folder's URI."""
    return f"run {uri}"


class Training(threading.Thread):
    """Ray Train's part of a run; what it fails with is told to the coordinator."""

    def __init__(
        self,
        assignment: Assignment,
        coordinator: Any,
        accelerator: Accelerator,
        offered: Offer | None,
        choose: Callable[[], int],
    ) -> None:
        """Args:
        choose: how many workers there is room for now.
        """
        super().__init__(name="ray-train", daemon=True)
        self._assignment, self._coordinator = assignment, coordinator
        self._accelerator, self._offered, self._choose = accelerator, offered, choose
        halted.clear()

    def run(self) -> None:
        """See threading.Thread."""
        import ray

        try:
            # Ray Train's own bookkeeping is not the run's state: it goes to a folder of its own, deleted at the end.
            with tempfile.TemporaryDirectory(prefix=scratch_prefix(os.getpid())) as scratch:
                self._build(scratch).fit()
        except asyncio.CancelledError:
            return  # halted
        except Exception as error:
            text = redact(f"{type(error).__name__}: {error}")
            try:
                ray.get(self._coordinator.fail.remote(text.splitlines()[0], 1, text))
            except ray.exceptions.RayError:  # it is started anew, and told of this thread's end by who follows the run
                log.exception("the coordinator cannot be told why Ray Train failed")

    def halt(self) -> None:
        """End the thread before the connection to Ray is closed under it, if it has not ended by itself."""
        halted.set()
        if self.is_alive():
            self.join(HALT_S)

    def _build(self, scratch: str) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from orchestrator.ray_backend import OwnGroupConfig, Trainer

        assignment, accelerator = self._assignment, self._accelerator
        config, name = assignment.plan.config, coordinator_name(assignment.uri)
        task = {
            "plan": assignment.plan,
            "uri": assignment.uri,
            "token": assignment.token,
            "coordinator": name,
            "group_timeout_s": GROUP_TIMEOUT_S,
            "loopback": assignment.loopback,
            "faults": assignment.faults,
        }
        scaling = ScalingConfig(
            num_workers=assignment.expected,
            use_gpu=accelerator.kind == "cuda",
            use_tpu=accelerator.kind == "tpu",
            accelerator_type=config.accelerator_type or None,
            topology=config.topology or None,
            resources_per_worker=accelerator.per_worker,
            placement_strategy=config.placement.upper().replace("-", "_"),
            label_selector=dict(config.node_labels.items) or None,
        )
        return Trainer(
            self._train_function(),
            asked_for=assignment.maximum if self._offered else 0,
            choose=self._choose,
            train_loop_config=task,
            torch_config=OwnGroupConfig(coordinator=name, maximum=assignment.maximum, inherits=assignment.loopback),
            scaling_config=scaling,
            run_config=RunConfig(
                storage_path=scratch,
                name="ray-train",
                failure_config=FailureConfig(max_failures=config.max_incidents),
                worker_runtime_env={"env_vars": MALLOC},
            ),
        )

    def _train_function(self) -> Any:
        config = self._assignment.plan.config
        if config.sync == "parameter-server":
            from orchestrator.served_worker import train_served_worker as train_worker
        elif config.parallel.splits:
            from orchestrator.split_worker import train_split_worker as train_worker
        else:
            from orchestrator.worker import train_worker
        return train_worker
