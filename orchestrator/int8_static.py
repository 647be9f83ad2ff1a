"""Static int8: ranges of activations from calibration, or fine-tuned for; through torchao's PT2E and x86 quantizer.

The x86 quantizer leaves a convolution's result in fp32 where a sum follows, which inductor fuses. onnxruntime
computes a convolution in int8 only where its result is quantized too, so here every result is: 20 of ResNet-18's 20
convolutions instead of 12, and 164 instead of 270 ms for 32 images of 32x32 (2026-11-24, one core of an AMD EPYC;
fp32 344 to 472 ms).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from orchestrator.programs import WEIGHT_RANGE, Asked, Axes, Program, program_of, quiet

with quiet():  # it tells which CUDA kernels it cannot load
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

ANNOTATION = "quantization_annotation"  # torchao's key in a node's meta
aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default,)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
RELUS = (aten.relu.default, aten.relu_.default)
MOMENTUM = 0.9


class Int8Quantizer(X86InductorQuantizer):
    """The x86 quantizer, with the results of convolutions and sums quantized wherever they go.

    Args:
        fine_tune: put trainable stand-ins for int8 into the graph, not observers.
    """

    def __init__(self, fine_tune: bool) -> None:
        super().__init__()
        config = get_default_x86_inductor_quantization_config(is_qat=fine_tune)
        weight = dataclasses.replace(config.weight, quant_min=-WEIGHT_RANGE, quant_max=WEIGHT_RANGE)
        self.set_global(dataclasses.replace(config, weight=weight))

    def annotate(self, model: GraphModule) -> GraphModule:
        """Say which edges of the graph are to be int8."""
        super().annotate(model)
        spec = self.global_config.input_activation
        for node in model.graph.nodes:
            if node.target in SUMS and all(isinstance(argument, Node) for argument in node.args):
                _annotation(node).input_qspec_map.update(dict.fromkeys(node.args, spec))
            elif node.target not in CONVOLUTIONS:
                continue
            users = list(node.users)
            last = users[0] if len(users) == 1 and users[0].target in RELUS else node
            _annotation(last).output_qspec = spec
        return model


def _annotation(node: Node) -> Any:
    found = node.meta.setdefault(ANNOTATION, QuantizationAnnotation())
    found._annotated = True
    return found


def calibrate(
    model: nn.Module, example: tuple[Tensor, ...], axes: Axes, batches: Iterable[tuple[Tensor, ...]]
) -> Program:
    """The int8 program of a model in evaluation mode, with ranges from `batches` of its inputs."""
    prepared = _prepared(model, example, axes, fine_tune=False)
    with torch.no_grad():
        for inputs in batches:
            prepared(*inputs)
    return _converted(prepared, example, axes)


def fine_tune(
    model: nn.Module,
    example: tuple[Tensor, ...],
    axes: Axes,
    batches: Iterable[Any],
    steps: int,
    loss_of: Callable[[nn.Module, Any], Tensor],
    lr: float,
) -> Program | None:
    """The int8 program of a model after a step of SGD on each batch, computed as int8 would; None: it diverged.

    Batch normalization is folded into the convolutions first: its statistics stay those of training.

    Args:
        model: in evaluation mode; stays as it is.
        example: inputs to trace it with.
        batches: of training, each for one step.
        steps: so many batches.
        loss_of: (model, batch) -> the mean loss.
        lr: learning rate, falling linearly to 0.
    """
    prepared = _prepared(model, example, axes, fine_tune=True)
    student = Asked(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr, MOMENTUM)
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - number / steps)
        optimizer.zero_grad()
        try:
            loss = loss_of(student, batch)
        except RuntimeError as error:
            if "zero_point" not in str(error):
                raise
            return None  # torchao's, of a range of activations that is not finite
        loss.backward()
        optimizer.step()
        if not all(value.isfinite().all() for value in (loss, *prepared.parameters())):
            return None
    return _converted(prepared, example, axes)


def _prepared(model: nn.Module, example: tuple[Tensor, ...], axes: Axes, fine_tune: bool) -> GraphModule:
    # Strict: the quantizer tells apart two calls of one module (torchvision's blocks use one ReLU twice).
    program = program_of(model, example, axes, strict=True)
    # Parameters of the copy only: fine-tuning leaves the model as it is.
    graph: Any = program.module()
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    with quiet():
        prepared: GraphModule = prepare_pt2e(graph, Int8Quantizer(fine_tune))
    return prepared


def _converted(prepared: GraphModule, example: tuple[Tensor, ...], axes: Axes) -> Program:
    with quiet():
        converted = convert_pt2e(prepared)
    _drop_unused(converted)
    return program_of(converted, example, axes, strict=True)


def _drop_unused(graph: GraphModule) -> None:
    """The fp32 weights, which stay beside the int8 ones and would be saved with them."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in used:
            parent, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(parent), leaf)
