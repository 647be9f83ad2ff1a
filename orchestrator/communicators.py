"""What process groups need on accelerators: NCCL communicators that one worker ends alone, a TPU slice's own group."""

import datetime
from typing import Any

import torch
import torch.distributed as dist


def meet(store: dist.Store, moment: str, rank: int, world: int) -> None:
    """Wait until all are at `moment`, no longer than the store waits; raises RuntimeError."""
    store.set(f"{moment}-{rank}", "1")
    store.multi_get([f"{moment}-{other}" for other in range(world)])


def abort_communicators() -> None:
    """End all NCCL communicators of this process at once, with what waits in them.

    One after the other they may wait for each other; see torch's _abort_process_group, which forgets the groups too.
    """
    groups = sorted(dict(dist.distributed_c10d._world.pg_names).items(), key=lambda named: named[1], reverse=True)
    first: Any = groups[0][0]._get_backend(torch.device("cuda"))
    first._group_start()
    for group, _ in groups:
        group.abort()
    first._group_end()


def slice_group(store: dist.Store, rank: int, timeout: datetime.timedelta) -> Any:
    """torch.distributed's "xla" group of this process's TPU slice; None where the slice is this process alone.

    The processes of a slice are one XLA client from their start to their end: its numbers are their ranks in the slice,
    whatever the generation.

    Raises:
        RuntimeError: this worker sits in another order than its slice.
    """
    import torch_xla.runtime as xr
    from torch_xla.distributed.xla_backend import ProcessGroupXla

    size, place = xr.world_size(), xr.global_ordinal()
    if size == 1:
        return None
    if rank % size != place:
        raise RuntimeError(f"rank {rank} sits at place {rank % size} of its slice, and is number {place} there")
    return ProcessGroupXla(store, place, size, timeout)
