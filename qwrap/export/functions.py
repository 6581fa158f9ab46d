"""Types that ONNX has no operator for, as model functions of primitive operators.

They compute what the simulation does, bit for bit, in onnxruntime with and without optimisations.
For that a Max stands before each division, and a Min or Where behind each last product: onnxruntime
would make the division by a scale behind a MatMul a multiplication within that MatMul, and the
product before one as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qwrap.dtypes import QuantType

DOMAIN = "qwrap"
VERSION = 1
LOWEST_IR_VERSION = 8  # functions of a model
MOST_COMPARED = 32  # levels; from more on halving takes less time than comparing with all


def fake_quantizer(dtype: QuantType, real: ir.DataType, opset: int, name: str) -> ir.Function:
    """Return the function ``(x, scale[, zero_point]) -> y`` that quantizes and dequantizes.

    Args:
        dtype: an integer, whose function has a zero point of type int32, or a code book.
        real: type of ``x``; scales are float32, and have to broadcast against it.
        opset: of ai.onnx, 11 or more.
        name: what to call it.
    """
    body = _Body()
    x = "x" if real == ir.DataType.FLOAT else body.add("Cast", "x", to=TensorProto.FLOAT)
    if dtype.codebook:
        inputs, result = ["x", "scale"], _nearest_level(body, x, dtype)
    else:
        inputs, result = ["x", "scale", "zero_point"], _integer(body, x, dtype)
    text = f"x rounded to the numbers of {dtype}, in units of scale."
    return body.function(name, inputs, result, real, opset, text)


def dequantizer(dtype: QuantType, real: ir.DataType, opset: int, name: str) -> ir.Function:
    """Return the function ``(codes, scale[, zero_point]) -> y`` of a stored constant.

    Args:
        dtype: an integer, whose function has a zero point of type int32, or a code book.
        real: type of ``y``; scales are float32, and have to broadcast against the codes.
        opset: of ai.onnx, 11 or more.
        name: what to call it.
    """
    body = _Body()
    if dtype.codebook:
        inputs, index = ["codes", "scale"], body.add("Cast", "codes", to=TensorProto.INT32)
        assert dtype.levels is not None
        number = body.add("Gather", body.constant("levels", dtype.levels), index, axis=0)
        text = f"Levels of {dtype} by their index, times scale."
    else:
        inputs = ["codes", "scale", "zero_point"]
        code, zero_point = (body.add("Cast", n, to=TensorProto.FLOAT) for n in inputs[::2])
        number = body.add("Sub", code, zero_point)
        text = f"What codes of {dtype} stand for, in units of scale."
    return body.function(name, inputs, body.add("Mul", number, "scale"), real, opset, text)


def _integer(body: _Body, x: str, dtype: QuantType) -> str:
    zero_point = body.add("Cast", "zero_point", to=TensorProto.FLOAT)
    least, most = (
        body.add("Mul", body.add("Sub", body.constant(name, code), zero_point), "scale")
        for name, code in (("qmin", dtype.qmin), ("qmax", dtype.qmax))
    )
    steps = body.add("Div", body.add("Max", x, least), "scale")
    return body.add("Min", body.add("Mul", body.add("Round", steps), "scale"), most)


def _nearest_level(body: _Body, x: str, dtype: QuantType) -> str:
    assert dtype.levels is not None
    least = body.add("Mul", body.constant("least", dtype.levels[0]), "scale")
    steps = body.add("Div", body.add("Max", x, least), "scale")
    find = _index_by_halving if len(dtype.levels) > MOST_COMPARED else _index_by_comparing
    index = find(body, steps, dtype.middles)
    level = body.add("Gather", body.constant("levels", dtype.levels), index, axis=0)
    return body.add("Where", body.add("IsNaN", x), x, body.add("Mul", level, "scale"))


def _index_by_comparing(body: _Body, steps: str, middles: Sequence[float]) -> str:
    """Count the middles that ``steps`` exceeds."""
    index = ""
    for i, middle in enumerate(middles):
        above = body.add("Greater", steps, body.constant(f"middle_{i}", middle))
        counted = body.add("Cast", above, to=TensorProto.INT32)
        index = body.add("Add", index, counted) if index else counted
    return index


def _index_by_halving(body: _Body, steps: str, middles: Sequence[float]) -> str:
    """Compare with the middle of what is left, for as many rounds as the index has bits."""
    bits = len(middles).bit_length()
    padded = [*middles, *[math.inf] * (2**bits - 1 - len(middles))]
    index = ""
    for bit in range(bits):
        width = 2 ** (bits - bit)  # of the part that holds the level
        tops = padded[width // 2 - 1 :: width]
        table = body.constant(f"middles_{bit}", tops if index else tops[0])
        middle = body.add("Gather", table, index, axis=0) if index else table
        above = body.add("Cast", body.add("Greater", steps, middle), to=TensorProto.INT32)
        index = body.add("Add", body.add("Add", index, index), above) if index else above
    return index


class _Body:
    """The nodes of a function as it is written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        name = output or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant(self, name: str, values: float | Sequence[float]) -> str:
        """Add a float32 constant; return its name."""
        tensor = numpy_helper.from_array(np.array(values, dtype=np.float32))
        return self.add("Constant", output=name, value=tensor)

    def function(
        self,
        name: str,
        inputs: Sequence[str],
        result: str,
        real: ir.DataType,
        opset: int,
        text: str,
    ) -> ir.Function:
        """Return the function that returns ``result`` as ``real``."""
        if real == ir.DataType.FLOAT:
            self.nodes[-1].output[0] = "y"
            assert result not in {i for node in self.nodes for i in node.input}
        else:
            self.add("Cast", result, output="y", to=real.value)
        imports = [helper.make_opsetid("", opset)]
        proto = helper.make_function(
            DOMAIN, name, inputs, ["y"], self.nodes, imports, doc_string=text
        )
        function = ir.from_proto(proto)
        assert isinstance(function, ir.Function)
        return function
