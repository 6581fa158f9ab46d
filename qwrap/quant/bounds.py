"""What an activation that a kernel's output clamp replaces lets through."""

from __future__ import annotations

import math

import onnx_ir as ir

from qwrap.model.values import Values


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
