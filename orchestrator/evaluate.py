"""Held-out evaluation, shared among the workers, with the same bits for any number of them."""

import torch

from orchestrator.devices import host_of
from orchestrator.feed import batches
from orchestrator.group import Group
from orchestrator.plan import Request
from orchestrator.precision import Precision
from workloads.workload import Workload

CHUNK = 64  # samples a forward pass; fixed, for bits depend on it


@torch.no_grad()
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
    chunks = torch.arange(len(samples)).split(CHUNK)
    mine = range(len(chunks) * group.rank // group.world, len(chunks) * (group.rank + 1) // group.world)
    was_training = model.training
    model.eval()
    requests = (Request(0, chunks[c].numpy()) for c in mine)
    rows: torch.Tensor | None = None
    names: list[str] = []
    try:
        for c, (_, batch) in zip(mine, batches(samples, requests, loader_processes, group.device), strict=True):
            group.step_on()
            with precision.autocast():
                sums = workload.sums(model, batch)
            names = ["loss", "count", *sorted(sums.others)]
            if rows is None:
                rows = torch.zeros(len(chunks), len(names), dtype=torch.float64, device=host_of(group.device))
            values = [sums.loss, sums.count, *(sums.others[n] for n in sorted(sums.others))]
            rows[c] = torch.stack([torch.as_tensor(v, device=host_of(group.device)).double() for v in values])
        if in_step and len(mine) * group.world < len(chunks):
            (_, batch), *_ = batches(samples, [Request(0, chunks[0].numpy())], 0, group.device)
            with precision.autocast():
                workload.sums(model, batch)
    finally:
        model.train(was_training)
    rows, names = _agree(rows, names, len(chunks), group)
    group.sum(rows)
    totals = dict(zip(names, rows.sum(0).tolist(), strict=True))
    return workload.metrics(totals)


def _agree(rows: torch.Tensor | None, names: list[str], chunks: int, group: Group) -> tuple[torch.Tensor, list[str]]:
    """With more workers than chunks some have computed nothing: they learn the row's width from the others."""
    if chunks < group.world:
        names = max(group.gather_objects(names), key=len)
    if rows is None:
        rows = torch.zeros(chunks, len(names), dtype=torch.float64, device=host_of(group.device))
    return rows, names
