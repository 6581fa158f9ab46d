"""What comes out of an operator whatever goes in: an activation's clamp, a bounded function."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from qwrap.config import QuantSpec
from qwrap.model.values import Values
from qwrap.numerics import QParams, choose_qparams


def bounds_of(values: Values, node: ir.Node) -> tuple[float, float] | None:
    """Return the smallest and largest output of a Relu or Clip, None if known only at run time."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    ends = [-math.inf, math.inf]
    for i, name in enumerate(("min", "max")):  # attributes up to opset 10, inputs since
        if name in node.attributes:
            ends[i] = node.attributes[name].as_float()
        value = node.inputs[i + 1] if len(node.inputs) > i + 1 else None
        if value is not None:
            number = values.small_constant(value)
            if number is None or number.size != 1:
                return None
            ends[i] = float(number.item())
    return ends[0], ends[1]


def operator_qparams(low: float, high: float, spec: QuantSpec) -> QParams:
    """Return the scale and zero point for everything that an operator can put out.

    The codes of an integer type are spread over ``[low, high)`` in steps of the width over their
    number: 1/256 for Softmax in 8 bits, which is what onnxruntime's QLinearSoftmax is right for.
    Other types reach both ends.

    Args:
        low: smallest output, at most 0.
        high: largest output.
        spec: how the output is quantized, with one scale.
    """
    ends = low, high
    if spec.dtype.is_integer:
        codes = 2 ** (spec.dtype.bits - spec.reduce_range)
        steps = float(spec.qmax - spec.qmin)
        if spec.symmetric:
            reach = max(-low, high) / codes * steps
            ends = -reach, reach
        else:
            ends = low, low + (high - low) / codes * steps
    return choose_qparams(
        torch.tensor(ends[0], dtype=torch.float64), torch.tensor(ends[1], dtype=torch.float64), spec
    )
