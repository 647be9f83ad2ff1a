"""`--dry-run`: the complete plan. No Ray is started; with --address that cluster is asked what it has."""

import os
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from orchestrator import balance
from orchestrator.accelerators import Accelerator
from orchestrator.balancer import follows_speed
from orchestrator.cluster_fit import Node, Offer, declared_speed, where
from orchestrator.config import RunConfig, to_toml
from orchestrator.errors import UserError
from orchestrator.launch import nodes as living_nodes
from orchestrator.layout import Layout, group_placement, layout_of
from orchestrator.offer import offer
from orchestrator.plan import Plan
from orchestrator.resume import choose, settle_accelerator
from orchestrator.runfolder import RunFolder
from orchestrator.shards import Placement, even_placement, live_blocks
from orchestrator.slices import whole_slices

OPTIMIZER_COPIES = {"sgd": 1, "nesterov": 1, "adam": 2, "adamw": 2}  # fp32 tensors the optimizer keeps per parameter

HERE = "this machine"


def describe(plan: Plan, folder: RunFolder, data: str) -> str:
    """The plan for people: work, workers, shards, placement, memory, and the configuration as TOML."""
    given, schedule = plan.config, plan.schedule
    parameters, forward_bytes = _measure(plan)
    nodes, offered, note = _cluster(given)
    here = nodes[0].name == HERE
    config, accelerator = settle_accelerator(given, nodes, Offer(known=False) if here else offered)
    plan = plan.with_config(accelerator=accelerator.kind, precision=config.precision)
    copies = 1 + OPTIMIZER_COPIES[config.optimizer] + (config.sync == "diloco")  # of which the last is outer momentum
    state = 4 * parameters * copies
    try:
        workers = choose(config, accelerator, nodes, offered)
    except UserError:
        if not here:
            raise
        workers, note = config.workers.minimum, "are more than this machine has; the cluster must have them"
    on = _where(config, accelerator, nodes, workers)
    placement = _placement(config, [nodes[number] for number in on], workers)
    layout = layout_of(config.parallel, workers)
    state //= layout.size
    gradients = _gradients(config, 4 * parameters // layout.size, state, placement)
    reserved = ", ".join(f"{name}={amount:g}" for name, amount in accelerator.per_worker.items())
    lines = [
        f"workload      {plan.workload}: {config.model}, {parameters:,} parameters",
        f"data          {data}",
        f"steps         {plan.total_steps} of {config.batch_size} samples ({schedule.steps_per_epoch} an epoch)",
        f"shards        {config.shards} of {schedule.microbatch_size} samples, reduced {config.reduce}",
        f"sync          {_sync(plan)}",
        *([f"parallel      {_parallel(config, layout)}"] if config.parallel.splits else []),
        f"workers       {config.workers} asked for; {workers} {note}",
        f"accelerator   {accelerator}",
        f"each          {reserved}, {config.threads} thread(s), {_precision(config)}",
        f"placement     {config.placement}; as Ray is expected to place them:",
        *_by_node(placement, layout, [nodes[number].name for number in on], config.sync != "parameter-server"),
        f"memory        about {_size(state + gradients + forward_bytes)} a worker beside torch's own "
        f"(state {_size(state)}, gradients at most {_size(gradients)}, activations about {_size(forward_bytes)})",
        f"checkpoint    {_size(state * layout.size)} every {config.checkpoint_every}, {config.keep_checkpoints} kept",
        f"run folder    {folder.uri}",
        f"identity      {plan.identity()[:16] if config.precision != 'auto' else 'when the precision is measured'}",
        "",
        to_toml(given, plan.workload).rstrip(),
    ]
    return "\n".join(lines)


def _precision(config: RunConfig) -> str:
    return config.precision if config.precision != "auto" else "precision measured at the start"


def _sync(plan: Plan) -> str:
    """How workers share what they learn, and what the result depends on."""
    config = plan.config
    how = {
        "allreduce": "gradients of every step",
        "parameter-server": f"{config.servers} servers, staleness {config.staleness}",
        "local-sgd": f"average of the shards' parameters every {config.local_steps} steps",
        "diloco": f"outer step of {config.outer_lr:g} (Nesterov {config.outer_momentum:g}) "
        f"every {config.local_steps} steps",
    }[config.sync]
    depends = "; the result depends on timing and on the number of workers" if config.staleness.steps else ""
    return f"{config.sync}: {how}{depends}"


def _parallel(config: RunConfig, layout: Layout) -> str:
    """How the model is held."""
    groups = f"{layout.groups} replica group{'s' if layout.groups > 1 else ''} of {layout.size} workers"
    bits = "bits of the whole model" if config.parallel.kind == "pipeline" else "last bits of its own"
    return f"{config.parallel}: {groups}, each with the model once, in parts; {bits}"


def _cluster(config: RunConfig) -> tuple[Sequence[Node], Offer | None, str]:
    """(nodes, what an autoscaler may add, where that is known from); Ray is asked only if a cluster was named."""
    if config.address == "local" or not (config.address or os.environ.get("RAY_ADDRESS")):
        has = {"GPU": float(_gpus()), "TPU": float(len(list(Path("/dev").glob("accel[0-9]*"))))}
        here = {"CPU": float(os.cpu_count() or 1), **{name: count for name, count in has.items() if count}}
        return [Node(here, {}, HERE)], None, "if the cluster is this machine alone"
    from orchestrator.connect import cluster

    with cluster(config.address, Path(os.devnull)):
        found, offered = living_nodes(), offer()
    return found, offered, f"to begin with; the cluster has {len(found)} node(s) now"


def _gpus() -> int:
    """GPUs that a Ray of this machine alone would have."""
    there, shown = len(list(Path("/dev").glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if shown is None else min(there, sum(word.strip() not in ("", "-1") for word in shown.split(",")))


def _where(config: RunConfig, accelerator: Accelerator, nodes: Sequence[Node], workers: int) -> list[int]:
    """The node's number for each worker: on TPUs slice after slice."""
    if accelerator.shape is None:
        return where(nodes, accelerator.per_worker, config.placement, dict(config.node_labels.items), workers)
    hosts = [host for slice_ in whole_slices(nodes, accelerator.shape) for host in slice_]
    each = accelerator.shape.chips_per_host
    return [next(n for n, node in enumerate(nodes) if node is host) for host in hosts for _ in range(each)][:workers]


def _placement(config: RunConfig, on: Sequence[Node], workers: int) -> Placement:
    """Shards by declared speeds, as the first generation has them."""
    declared = [declared_speed(node.labels) for node in on] + [0.0] * (workers - len(on))
    if config.parallel.splits:
        return group_placement(config.parallel, layout_of(config.parallel, workers), config.shards)
    if not follows_speed(config):
        return even_placement(config.shards, workers)
    return balance.placement(config.shards, balance.speeds([balance.ShardPace()] * workers, declared))


def _gradients(config: RunConfig, parameters: int, state: int, placement: Placement) -> int:
    """Bytes of gradients, and of what is summed, on the worker with the most.

    Args:
        parameters, state: bytes of the parameters alone, and with their optimizer state.
    """
    if config.sync == "parameter-server":
        return 3 * parameters  # autograd's, the flat one, the one on its way
    blocks = max(map(live_blocks, placement)) + 1
    return blocks * parameters if config.sync == "allreduce" else (blocks + 2) * state


def _by_node(placement: Placement, layout: Layout, names: Sequence[str], owned: bool) -> list[str]:
    """A line for each node: its workers and their shards; `owned`: whether shards belong to workers at all."""
    owners = [(names[rank] if rank < len(names) else "a node to come", rank) for rank in range(layout.workers)]
    lines = []
    for name, group in groupby(owners, key=lambda owner: owner[0]):
        own = [(rank, placement.range_of(layout.group_of(rank))) for _, rank in group]
        held = (f"worker {rank}: {f'{r.start}-{r.stop - 1}' if owned else 'any shard'}" for rank, r in own)
        lines.append(f"  {name}: " + ", ".join(held))
    return lines


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
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in training, where they go to Ray's log
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
