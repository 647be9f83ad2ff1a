"""What Ray Train is given of ours, and hands on to its workers."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy


class OwnGroupBackend(Backend):
    """Leaves process groups to the workers, which build one a generation; a lost worker is replaced alone."""

    has_replica_groups = True


@dataclass
class OwnGroupConfig(BackendConfig):
    """TorchTrainer's torch_config with `OwnGroupBackend`.

    Attributes:
        backend: what TorchTrainer asks for by name.
        coordinator: name of the run's coordinator actor.
        maximum: workers that the run may grow to.
        inherits: a worker's process has its environment variables from the node that starts it.
    """

    backend: str = "own"
    coordinator: str = ""
    maximum: int = 1
    inherits: bool = False

    @property
    def backend_cls(self) -> type[Backend]:
        return OwnGroupBackend


class ChoosingPolicy(FixedScalingPolicy):
    """A group whose number is chosen anew where it could not start: others have taken the room, or a node has gone.

    Attributes:
        choose: the number of workers there is room for now.
    """

    choose: Callable[[], int]
    _asked = False

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision:
        """See ScalingPolicy."""
        decision: ResizeDecision = super().make_decision_for_non_running_worker_group()
        if self._asked:
            decision = dataclasses.replace(decision, num_workers=self.choose())
        self._asked = True
        return decision


class GrowingPolicy(ChoosingPolicy):
    """A group that starts with a fixed number of workers and asks the autoscaler for the most it may have."""

    maximum = 1

    def _get_num_workers_for_resource_request(self) -> int:
        return self.maximum


class StaticPolicy(ChoosingPolicy):
    """A fixed number of workers on a cluster without an autoscaler: nobody is asked for nodes."""

    def after_controller_start(self, train_run_context: object) -> None:
        """Nothing to register."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing to renew."""
