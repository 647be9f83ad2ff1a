"""Held-out evaluation, shared among the workers, with the same bits for any number of them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch

from orchestrator.devices import host_of
from orchestrator.feed import batches
from orchestrator.group import Group
from orchestrator.plan import Request
from orchestrator.precision import Precision
from orchestrator.stopwatch import Stopwatch
from workloads.workload import Samples, Workload

CHUNK = 64  # samples a forward pass; fixed, for bits depend on it


def evaluate(
    workload: Workload,
    model: torch.nn.Module,
    precision: Precision,
    group: Group,
    loader_processes: int,
    in_step: bool = False,
) -> dict[str, float]:
    """The workload's held-out metrics; every worker calls it and gets the same.

    Each fixed chunk of the split is summed alone and by one worker; a row of zeros stands for the others, so the
    sum over workers is exact, and the rows are added in their order in fp64.

    Args:
        in_step: whether all workers have to take as many forward passes; those with less to do take one for nothing.
    """
    samples = workload.samples("heldout")
    chunks = -(-len(samples) // CHUNK)
    mine = range(chunks * group.rank // group.world, chunks * (group.rank + 1) // group.world)
    signs = (group.step_on, group.clock)
    names, own = sums_of(workload, model, precision, samples, mine, loader_processes, group.device, *signs)
    if in_step and len(mine) * group.world < chunks:
        sums_of(workload, model, precision, samples, [0], 0, group.device, clock=group.clock)
    if chunks < group.world:  # some have computed nothing: they learn the rows' width from the others
        names = max(group.gather_objects(names), key=len)
    rows = torch.zeros(chunks, len(names), dtype=torch.float64, device=host_of(group.device))
    if mine:
        rows[mine.start : mine.stop] = own
    group.sum(rows)
    return workload.metrics(totals(names, rows))


@torch.no_grad()
def sums_of(
    workload: Workload,
    model: torch.nn.Module,
    precision: Precision,
    samples: Samples,
    chunks: Sequence[int],
    loader_processes: int,
    device: torch.device,
    step_on: Callable[[], None] = lambda: None,
    clock: Stopwatch | None = None,
) -> tuple[list[str], torch.Tensor]:
    """What each of some chunks of a split adds to its totals.

    Args:
        chunks: their numbers; chunk c is the samples from c * CHUNK on, CHUNK of them but for the last.
        step_on: called before each.
        clock: is told of waits for samples.

    Returns:
        The sums' names, and a row of them for each chunk, fp64 [len(chunks), len(names)], on the host's side.
    """
    requests = (Request(0, np.arange(c * CHUNK, min((c + 1) * CHUNK, len(samples)))) for c in chunks)
    host = host_of(device)
    names: list[str] = []
    rows: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for _, batch in batches(samples, requests, loader_processes, device, clock):
            step_on()
            # A chunk may take as long as many steps, or be compiled first: the limit for those is not for it.
            with clock.away() if clock and not getattr(workload, "meets_others", False) else nullcontext():
                with precision.autocast():
                    sums = workload.sums(model, batch)
                names = ["loss", "count", *sorted(sums.others)]
                values = [sums.loss, sums.count, *(sums.others[n] for n in sorted(sums.others))]
                rows.append(torch.stack([torch.as_tensor(v, device=host).double() for v in values]))
    finally:
        model.train(was_training)
    return names, torch.stack(rows) if rows else torch.zeros(0, 0, dtype=torch.float64, device=host)


def totals(names: Sequence[str], rows: torch.Tensor) -> dict[str, float]:
    """The sums of a whole split from those of its chunks, in their order."""
    return dict(zip(names, rows.sum(0).tolist(), strict=True))
