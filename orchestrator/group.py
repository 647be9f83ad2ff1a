"""A process group of one generation: who is in it, and the collectives that training needs."""

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The workers of a generation, as seen by one of them. With one worker nothing is ever sent."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def connect(
        cls, store: dist.Store, generation: int, rank: int, world: int, device: torch.device, timeout_s: float
    ) -> "Group":
        """Build the process group of `generation`; blocks until all `world` members are there.

        Raises:
            RuntimeError: torch's own, when a member does not come within `timeout_s`.
        """
        if world > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"generation-{generation}", store),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        return cls(rank, world, device)

    def close(self) -> None:
        """Leave; connections of the process group are closed."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` with that of rank `source`."""
        if self.world > 1:
            dist.broadcast(tensor, source)

    def sum(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the sum over workers; exact only where at most one adds a non-zero."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def broadcast_object(self, value: Any) -> Any:
        """The `value` that rank 0 gave."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, 0, device=self.device)
        return values[0]
