"""The opset that a plan's types and axes need."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.quant.plan import QuantPlan

PER_AXIS = 13  # QuantizeLinear-13 brought ``axis``


def required_opset(plan: QuantPlan) -> int:
    """Return the lowest ai.onnx opset in which every QDQ pair of ``plan`` can be written."""
    specs = [p.spec for p in (*plan.tensors.values(), *plan.constants.values())]
    needed = [spec.dtype.opset for spec in specs]
    needed += [PER_AXIS for spec in specs if spec.axis is not None]
    return max(needed, default=1)


def raise_opset(model: ir.Model, opset: int) -> None:
    """Convert ``model`` to ``opset`` if it is older, in place.

    Raises:
        ExportError: a node cannot be converted.
    """
    current = model.opset_imports.get("", 1)
    if current >= opset:
        return
    raise ExportError(f"needs opset {opset}, has {current}")


_ = onnx
