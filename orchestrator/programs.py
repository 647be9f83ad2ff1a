"""A trained model as a torch.export program and as ONNX; the sizes of a batch stay free."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.exported import ONNX_LIMIT_BYTES

# int8 weights go from -64 to 64. CPUs without VNNI add two products of an activation (to 255) and a weight in 16 bits,
# and what is beyond is cut off: with weights to 127 the logits of a small BERT were 11 % off on AVX2, with these 0.5 %.
WEIGHT_RANGE = 64
TALKATIVE = ("torch.onnx", "torch.export", "torch.utils._pytree", "torchao", "onnxscript", "onnx_ir")
Axes = Sequence[Mapping[int, str]]
Program = torch.export.ExportedProgram


class Asked(nn.Module):
    """Something that computes a model's output from its inputs, as a model that a workload can train or evaluate."""

    def __init__(self, ask: Callable[..., Tensor]) -> None:
        super().__init__()
        self._ask = (ask,)  # in a tuple: not a submodule, for an exported program's eval() and train() raise

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._ask[0](*inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters tell their own developers."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def program_of(model: nn.Module, example: tuple[Tensor, ...], axes: Axes, strict: bool = False) -> Program:
    """The model as a program.

    Args:
        model: in the mode that the program is to have.
        example: inputs of which no free dimension has the size 1, or that of a parameter.
        axes: the free dimensions of each input.
        strict: trace with TorchDynamo, which tells the calls of one module apart (orchestrator.int8_static needs it).
    """
    shapes = tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for free in axes)
    with quiet():
        return torch.export.export(model, example, dynamic_shapes=shapes, strict=strict)


def save_program(program: Program, path: Path) -> None:
    """Write a program for torch.export.load; the example it was traced with stays out of it."""
    program.example_inputs = None
    with quiet():
        torch.export.save(program, path)


def save_onnx(program: Program, inputs: Sequence[str], axes: Axes, output: str, path: Path) -> bool:
    """Write a program as ONNX, checked by onnx; returns whether its weights lie beside it."""
    import onnx

    with quiet():
        converted = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=[output],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert converted is not None
    large = sum(t.numel() * t.element_size() for t in program.state_dict.values()) > ONNX_LIMIT_BYTES
    if large:
        converted.save(str(path), external_data=True)
        return True
    model = converted.model_proto
    _slim(model, axes)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return False


def _slim(model: Any, axes: Axes) -> None:
    """Drop stack traces and intermediate shapes, which outweigh a small int8 model; name the free dimensions."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    for value, free in zip(graph.input, axes, strict=True):
        for number, name in free.items():
            value.type.tensor_type.shape.dim[number].dim_param = name
    for value in graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = ""  # a product of others, under a number that says nothing
