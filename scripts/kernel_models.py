"""Smallest models that make onnxruntime run one operator as float and as integer kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
CODES = "codes"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator on one shape.

    Attributes:
        x: shape of the input; of every input where there are ``operands``.
        weight: shape of a stored weight, None without.
        operands: how many inputs of shape ``x`` there are.
        behind_conv: put a 1x1 Conv in front, whose layout the operator then works in.
    """

    op_type: str
    x: Shape
    weight: Shape | None = None
    operands: int = 1
    behind_conv: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """As the attribute of Conv."""
        return int(self.attributes.get("group", 1))

    @property
    def window(self) -> int:
        """Elements in the window of a pooling operator."""
        return math.prod(self.attributes.get("kernel_shape", (1,)))

    @property
    def data_shapes(self) -> list[Shape]:
        """Shapes of the data inputs."""
        second = product_shape(self.x) if self.op_type == "MatMul" and self.operands > 1 else self.x
        return [self.x, second][: self.operands]


def product_shape(x: Shape) -> Shape:
    """Shape of the second operand of a product with as many columns as ``x`` has rows."""
    return (*x[:-2], x[-1], x[-2])


class _Builder:
    def __init__(self, quantized: bool) -> None:
        self.quantized = quantized
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def pair(self, name: str, scale: float = 0.02, zero_point: int = 128) -> str:
        """A QuantizeLinear and DequantizeLinear behind ``name`` in the quantized model."""
        if not self.quantized:
            return name
        qparams = [
            self.constant(f"{name}.s", np.float32(scale)),
            self.constant(f"{name}.z", np.uint8(zero_point)),
        ]
        codes = self.node("QuantizeLinear", [name, *qparams], f"{name}.q")
        return self.node("DequantizeLinear", [codes, *qparams], f"{name}.dq")

    def weight(self, name: str, shape: Shape) -> str:
        codes = self.rng.integers(-127, 128, shape).astype(np.int8)
        if not self.quantized:
            return self.constant(name, codes.astype(np.float32) * np.float32(0.01))
        inputs = [self.constant(f"{name}.{CODES}", codes)]
        inputs += [self.constant(f"{name}.s", np.float32(0.01))]
        inputs += [self.constant(f"{name}.z", np.int8(0))]
        return self.node("DequantizeLinear", inputs, name)

    def bias(self, name: str, size: int) -> str:
        codes = self.rng.integers(-9999, 9999, size).astype(np.int32)
        scale = np.float32(0.02) * np.float32(0.01)
        if not self.quantized:
            return self.constant(name, codes.astype(np.float32) * scale)
        inputs = [self.constant(f"{name}.{CODES}", codes), self.constant(f"{name}.s", scale)]
        return self.node("DequantizeLinear", inputs, name)


def build(case: Case, *, quantized: bool) -> onnx.ModelProto:
    """Make the model of ``case``, with QDQ pairs around everything if ``quantized``."""
    b = _Builder(quantized)
    shapes = case.data_shapes
    data = []
    for index in range(len(shapes)):
        name = b.pair(f"x{index}", scale=0.02 + 0.01 * index)
        if case.behind_conv:
            c = case.x[1]
            weights = [b.weight(f"w{index}", (c, c, 1, 1)), b.bias(f"b{index}", c)]
            name = b.pair(b.node("Conv", [name, *weights], f"y{index}"))
        data.append(name)
    if case.weight is not None:
        data.append(b.weight("weight", case.weight))
    if case.op_type == "Conv" and case.weight is not None:
        data.append(b.bias("bias", case.weight[0]))
    softmax = (1 / 256, 0) if case.op_type == "Softmax" else (0.02, 128)
    result = b.node(case.op_type, data, "result", **case.attributes)
    if case.op_type not in ("Gemm", "MatMul") or case.operands > 1:
        result = b.pair(result, *softmax)
    return _model(b, result, shapes)


def _model(b: _Builder, result: str, shapes: list[Shape]) -> onnx.ModelProto:
    graph = helper.make_graph(
        b.nodes,
        "kernel",
        [
            helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, s)
            for i, s in enumerate(shapes)
        ],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in b.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
