"""Dynamic int8: weights as int8, activations quantized when they are there; in ONNX, and with torchao.

In ONNX every matrix product with a weight and every look-up of rows in one is int8, as in Q8BERT (Zafrir et al. 2019,
arXiv:1910.06188), with one scale for each output. A matrix that is used twice, as BERT's embeddings
are, is stored once, which onnxruntime's own quantize_dynamic does not do: it would make a small BERT half as large
again. Activations have one scale for the whole batch: what is in a batch moves the last digits of an answer.
"""

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.programs import WEIGHT_RANGE, Axes, Program, program_of, quiet

SMALLEST = 1024  # numbers in a weight; below, int8 saves nothing
RANGE = float(WEIGHT_RANGE)


class _Int8Graph:
    """An ONNX graph being rewritten.

    Attributes:
        nodes: the new graph's, in order.
    """

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self.nodes: list[Any] = []
        self._graph = graph
        self._floats = {tensor.name: tensor for tensor in graph.initializer}
        self._read = numpy_helper.to_array
        self._made: dict[str, NDArray[Any]] = {}
        self._quantized: set[str] = set()  # activations

    def rewrite(self) -> None:
        """Replace the nodes; drop the weights that are not used any more."""
        from onnx import numpy_helper

        for node in self._graph.node:
            if not self._replace(node):
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(self.nodes)
        self._graph.initializer.extend(kept)
        self._graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self._made.items())

    def _replace(self, node: Any) -> bool:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Gather" and self._is_weight(node.input[0]) and not _integer(attributes, "axis"):
            self._look_up(node)
        elif node.op_type == "MatMul" and self._is_weight(node.input[1]):
            self._multiply(node, transposed=False)
        elif node.op_type == "Gemm" and self._is_weight(node.input[1]) and _is_linear(attributes):
            self._multiply(node, transposed=bool(_integer(attributes, "transB")))
        else:
            return False
        return True

    def _is_weight(self, name: str) -> bool:
        tensor = self._floats.get(name)
        return tensor is not None and len(tensor.dims) == 2 and int(np.prod(tensor.dims)) >= SMALLEST

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _weight(self, name: str, axis: int) -> tuple[str, str]:
        """Names of the int8 matrix and of its scales, one for each index of `axis`."""
        int8, scales = f"{name}.int8.{axis}", f"{name}.scales.{axis}"
        if int8 not in self._made:
            weight = self._read(self._floats[name])
            largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
            steps = np.where(largest > 0, largest, 1.0) / RANGE
            self._made[int8] = np.rint(weight / steps).astype(np.int8)
            self._made[scales] = steps.reshape(-1).astype(np.float32)
        return int8, scales

    def _look_up(self, node: Any) -> None:
        """Rows of the int8 matrix, each times its scale."""
        int8, scales = self._weight(node.input[0], 0)
        out = node.output[0]
        rows = self._add("Cast", [self._add("Gather", [int8, node.input[1]], f"{out}.int8")], f"{out}.rows", to=1)
        self._made.setdefault("last_axis", np.asarray([-1], np.int64))
        scale = self._add("Gather", [scales, node.input[1]], f"{out}.scale")
        scale = self._add("Unsqueeze", [scale, "last_axis"], f"{out}.scales")
        self._add("Mul", [rows, scale], out)

    def _multiply(self, node: Any, transposed: bool) -> None:
        """In the form that onnxruntime fuses to one operator."""
        int8, scales = self._weight(node.input[1], 0 if transposed else 1)
        x, out = node.input[0], node.output[0]
        if x not in self._quantized:
            from onnx import helper

            parts = [f"{x}.uint8", f"{x}.step", f"{x}.zero"]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], parts))
            self._quantized.add(x)
        if transposed:  # done once, when the model is loaded
            int8 = self._add("Transpose", [int8], f"{out}.turned", perm=[1, 0])
        product = self._add("MatMulInteger", [f"{x}.uint8", int8, f"{x}.zero"], f"{out}.int32")
        step = self._add("Mul", [f"{x}.step", scales], f"{out}.step")
        bias = list(node.input[2:])
        scaled = self._add(
            "Mul", [self._add("Cast", [product], f"{out}.float", to=1), step], f"{out}.scaled" if bias else out
        )
        if bias:
            self._add("Add", [scaled, *bias], out)


def _integer(attributes: dict[str, Any], name: str) -> int:
    return int(attributes[name].i) if name in attributes else 0


def _is_linear(attributes: dict[str, Any]) -> bool:
    """Whether a Gemm is x W + b without factors."""
    ones = all(attributes[name].f == 1.0 for name in ("alpha", "beta") if name in attributes)
    return ones and not _integer(attributes, "transA")


def int8_onnx(model: Any) -> Any:
    """The same onnx.ModelProto with int8 weights and activations quantized on the fly."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    _Int8Graph(result.graph).rewrite()
    onnx.checker.check_model(result)
    return result


def int8_program(model: nn.Module, example: tuple[Tensor, ...], axes: Axes) -> Program:
    """The model with its linear layers through torchao, as a program; embeddings stay fp32.

    Loading it needs `import torchao`. Without torch.compile it is slower than fp32.
    """
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        from torchao.utils import unwrap_tensor_subclass

        int8 = copy.deepcopy(model).requires_grad_(False)
        quantize_(int8, Int8DynamicActivationInt8WeightConfig())
        unwrap_tensor_subclass(int8)
    with torch.no_grad():
        return program_of(int8, example, axes)
