"""What Ray Train is told to leave out: process groups are the orchestrator's, and nothing unused is started.

TorchTrainer starts five actors beside the workers. Each is a Python process that imports ray.train and ray.data,
which on two cores is most of the time from the command to the first step. Those that this run cannot use are
left out; the controller is in the command, whose end is its end either way (internals of Ray 2.60, which is why its
version is pinned).
"""

import asyncio
from collections.abc import Callable
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback

from orchestrator.leader import ElasticController
from orchestrator.ray_policy import GrowingPolicy, OwnGroupConfig, StaticPolicy

__all__ = ["OwnGroupConfig", "Trainer"]


class Trainer(TorchTrainer):
    """TorchTrainer with workers that are replaced one by one, without data sets and without a cleaner.

    A workload reads its own data. Ray removes the placement group of a job that ends by itself. The dashboard's page of
    Ray Train knows trainings by the actor of their controller, so it does not show ours.

    Args:
        asked_for: workers that the autoscaler is asked for; 0: there is none.
        choose: how many workers there is room for, asked where the first ones could not start.
    """

    def __init__(self, *arguments: Any, asked_for: int, choose: Callable[[], int], **named: Any) -> None:
        self._asked_for, self._choose = asked_for, choose
        super().__init__(*arguments, **named)

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback, StateManagerCallback)
        controller["callbacks"] = [c for c in controller["callbacks"] if not isinstance(c, unused)]
        if self._asked_for:
            controller["scaling_policy"] = GrowingPolicy(self.scaling_config)
            controller["scaling_policy"].maximum = self._asked_for
        else:
            controller["scaling_policy"] = StaticPolicy(self.scaling_config)
        controller["scaling_policy"].choose = self._choose
        kind: Any = ElasticController
        if self.scaling_config.use_tpu:
            from orchestrator.slice_rooms import SliceController as kind
        leader = kind(**controller)
        try:
            asyncio.run(leader.run())
        except asyncio.CancelledError:  # the command ends while workers are waited for: nobody wants nodes any more
            controller["scaling_policy"].before_controller_abort()
            raise
        return leader.get_result()
