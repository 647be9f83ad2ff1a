"""`--dry-run`: the complete plan, without Ray."""

import os

from orchestrator.cluster_fit import Node, choose_workers
from orchestrator.config import to_toml
from orchestrator.errors import UserError
from orchestrator.plan import Plan
from orchestrator.resume import gpu_wanted
from orchestrator.runfolder import RunFolder
from orchestrator.shards import even_placement, live_blocks

OPTIMIZER_COPIES = {"sgd": 1, "adam": 2, "adamw": 2}  # fp32 tensors the optimizer keeps per parameter


def describe(plan: Plan, folder: RunFolder, data: str) -> str:
    """The plan for people: work, workers, shards, placement, memory, and the configuration as TOML."""
    config, schedule = plan.config, plan.schedule
    parameters, forward_bytes = _measure(plan)
    per_worker = config.resources_per_worker.numbers() or (
        {"GPU": 1.0, "CPU": 1.0} if gpu_wanted(config) else {"CPU": 1.0}
    )
    state = 4 * parameters * (1 + OPTIMIZER_COPIES[config.optimizer])
    here = Node({"CPU": float(os.cpu_count() or 1), "GPU": float(gpu_wanted(config))}, {})
    try:
        workers = choose_workers(config, per_worker, [here])
        note = "if the cluster is this machine alone"
    except UserError:
        workers, note = config.workers.minimum, "more than this machine has; the cluster must have them"
    placement = even_placement(config.shards, workers)
    gradients = 4 * parameters * (max(map(live_blocks, placement)) + 1)
    ranges = ", ".join(f"worker {rank}: {own.start}-{own.stop - 1}" for rank, own in enumerate(placement))
    reserved = ", ".join(f"{name}={amount:g}" for name, amount in per_worker.items())
    lines = [
        f"workload      {plan.workload}: {config.model}, {parameters:,} parameters",
        f"data          {data}",
        f"steps         {plan.total_steps} of {config.batch_size} samples ({schedule.steps_per_epoch} an epoch)",
        f"shards        {config.shards} of {schedule.microbatch_size} samples, reduced {config.reduce}",
        f"workers       {config.workers} asked for; {workers} {note}",
        f"each          {reserved}, {config.threads} thread(s), {config.precision}",
        f"placement     {config.placement}; shards by {ranges}",
        f"memory        about {_size(state + gradients + forward_bytes)} a worker beside torch's own "
        f"(state {_size(state)}, gradients at most {_size(gradients)}, activations about {_size(forward_bytes)})",
        f"checkpoint    {_size(state)} every {config.checkpoint_every}, {config.keep_checkpoints} kept",
        f"run folder    {folder.uri}",
        f"identity      {plan.identity()[:16]}",
        "",
        to_toml(config, plan.workload).rstrip(),
    ]
    return "\n".join(lines)


def _measure(plan: Plan) -> tuple[int, int]:
    """(parameters, bytes that autograd keeps for one microbatch), from a real forward pass of two samples."""
    import numpy as np
    import torch

    from workloads.registry import WORKLOADS

    workload = WORKLOADS[plan.workload].build(plan.config)
    model = workload.build_model()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    samples = min(2, plan.train_samples)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        workload.sums(model.train(), workload.samples("train").microbatch(np.arange(samples), 0))
    activations = sum(size for address, size in kept.items() if address not in own)
    microbatch = plan.schedule.microbatch_size
    return sum(p.numel() for p in model.parameters()), activations * microbatch // samples


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
