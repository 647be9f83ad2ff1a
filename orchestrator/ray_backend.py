"""The backend that Ray Train is given: none of its own, for the process group is the orchestrator's."""

from dataclasses import dataclass

from ray.train.backend import Backend
from ray.train.torch import TorchConfig


class OwnGroupBackend(Backend):
    """Leaves process groups to the workers, which build one a generation."""


@dataclass
class OwnGroupConfig(TorchConfig):
    """TorchTrainer's torch_config with `OwnGroupBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return OwnGroupBackend
