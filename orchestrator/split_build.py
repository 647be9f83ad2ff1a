"""From a whole model to a worker's part of it: fully_shard, parallelize_module, stages of a pipeline."""

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from orchestrator.group import Group
from orchestrator.heap import return_large_blocks
from orchestrator.layout import layout_of
from orchestrator.optimizer import parameter_order
from orchestrator.pipeline import build_stage
from orchestrator.plan import Plan
from orchestrator.precision import Precision
from orchestrator.shards import derive_seed
from orchestrator.splits import SplitState, seating
from orchestrator.state import TrainingState
from workloads.workload import Workload


def build_part(plan: Plan, workload: Workload, group: Group) -> TrainingState:
    """A worker's part of the model as a new run has it; every worker of `group` calls it."""
    config, device = plan.config, group.device
    layout = layout_of(config.parallel, group.world)
    torch.manual_seed(derive_seed("weights", config.seed))
    model = workload.build_model()  # on the host, which alone may have room for all of it
    at, order = seating(group, layout), parameter_order(config, model)
    precision = Precision(config.precision, device.type)
    last = frozenset[str]()
    if config.parallel.kind == "pipeline":
        side = group.among([layout.members(number) for number in range(layout.groups)])
        return build_stage(config, model, workload, order, precision, at, side)
    if config.parallel.kind == "tensor":
        mesh = mesh_of(at.inside)
        parallelize_module(model, mesh, workload.tensor_plan(model, at.part, layout.size))
    else:
        last = spread(model, workload, at.inside)
    model.to(device)
    return SplitState(config, model, model, order, precision, at, last=last)


MESHES = itertools.count()
# Bytes of what is gathered and sent. On the heap, between pieces of gradients that stay, there is no room for the next:
# a worker of BERT-base took 3.1 GB where it takes 1.7 now, for a state of 0.7.
LARGE_BLOCK = 4 * 2**20
VECTOR = 16  # fp32 numbers of AVX-512; AVX2 has 8
SMALL = 2**16  # numbers of a parameter that all workers may hold


def mesh_of(group: Group) -> DeviceMesh:
    """The workers of a replica group, as torch's parallel modules take them.

    Torch remembers for meshes that are equal which piece is this worker's. Those of two generations are equal, for a
    mesh knows its own rank and does not compare it: a worker that has another rank by now would hold the wrong piece.
    The name of the dimension tells them apart. What torch remembers of a mesh it keeps for ever, and by its registry,
    which only a compiler reads, the process group with it: its threads and connections would stay.
    """
    made = DeviceMesh.from_group(group.process_group, group.device.type, mesh_dim_names=(f"mesh{next(MESHES)}",))
    made._pg_registry.clear()
    return made


def spread(model: nn.Module, workload: Workload, inside: Group) -> frozenset[str]:
    """Spread the parameters of `model` over a group, a layer at a time; gradients are added in the tree's order.

    Returns the names of those that lie channels last in a whole model, and here do not.
    """
    return_large_blocks(LARGE_BLOCK)
    last = frozenset(name for name, p in model.named_parameters() if p.ndim == 4 and lies_channels_last(p))
    # fully_shard takes contiguous parameters only; a convolution rounds otherwise where its weights lie otherwise.
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and lies_channels_last(module.weight):
            module.forward = functools.partial(forward_channels_last, module)  # type: ignore[method-assign]
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mesh, whole = mesh_of(inside), {p for p in model.parameters() if stays_whole(p, inside.world)}
    for module in (*workload.layers(model), model):
        # The model's own parameters stay whole until the backward pass, which begins with them.
        found: Any = fully_shard(module, mesh=mesh, reshard_after_forward=module is not model, ignored_params=whole)
        found.set_custom_reduce_scatter(TreeScatter())
        found.set_gradient_divide_factor(1.0)
        found.set_force_sum_reduction_for_comms(True)
    return last


def lies_channels_last(weight: Tensor) -> bool:
    """Whether this is how the memory of a convolution's weights is laid out."""
    return weight.is_contiguous(memory_format=torch.channels_last)


def stays_whole(parameter: Tensor, workers: int) -> bool:
    """Whether a small parameter would be cut so that pieces do not fill the processor's vectors.

    Torch's optimizers round the rest of a tensor, beyond its last whole vector, otherwise than what lies in vectors.
    """
    row = parameter.numel() // max(1, parameter.shape[0])
    piece = -(-parameter.shape[0] // workers) * row
    return parameter.numel() <= SMALL and bool(parameter.numel() % VECTOR or piece % VECTOR)


def forward_channels_last(convolution: nn.Conv2d, hidden: Tensor) -> Tensor:
    """Its forward pass with weights in the layout that those of a whole model have, for the same bits.

    The backward pass makes that copy of them again, when they are gathered again: kept, it would take the memory that
    cutting them into pieces saves.
    """
    weight = convolution.weight.to(memory_format=torch.channels_last)
    place = weight.data_ptr()

    def unpack(kept: Tensor | None) -> Tensor:
        return convolution.weight.detach().to(memory_format=torch.channels_last) if kept is None else kept

    with torch.autograd.graph.saved_tensors_hooks(lambda saved: None if saved.data_ptr() == place else saved, unpack):
        found: Tensor = convolution._conv_forward(hidden, weight, convolution.bias)
    return found


def tree_sum(rows: list[Tensor]) -> Tensor:
    """Neighbours are added until one is left."""
    while len(rows) > 1:
        pairs = [torch.add(left, right) for left, right in zip(rows[::2], rows[1::2], strict=False)]
        rows = pairs + rows[len(pairs) * 2 :]
    return rows[0]


class TreeScatter:
    """Each worker gets its chunk of every gradient and adds them in the tree's order; the sum, not the mean."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        output_tensor.copy_(tree_sum(list(received.view(group.size(), -1))).view_as(output_tensor))
