"""Activation functions that a tool took out, because the codes behind them end where they do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.graph.index import opset_of, walk_nodes
from qwrap.importing.stripped import Stripped, Tap
from qwrap.quant.placement.eligibility import CLAMPED

SIGNED = frozenset({*CLAMPED, "BatchNormalization", "ConvTranspose", "Div", "Sub"})
"""Operators whose results have both signs, behind which quantizers leave activations out."""
SIX = 6.0
CLIP_INPUTS = 11  # Clip-11 has its bounds as inputs


def restore_clamps(draft: ir.Model, stripped: Stripped) -> list[str]:
    """Put a Relu or Clip in front of what has no codes below zero, in place.

    onnxruntime's tool removes them: quantizing does their work. Without the pairs, in float, the
    model would be another one. A range up to 6 is taken for what a Clip to 6 leaves.

    Args:
        draft: without its pairs.
        stripped: what was taken out; its values become those behind the clamps.

    Returns:
        A line that says how many there are, if any.
    """
    constants, names = Constants(draft), {node.name for node in walk_nodes(draft.graph)}
    opset, count = opset_of(draft, ""), 0
    for value, tap in list(stripped.taps.items()):
        top = _end(value, tap)
        if top is None:
            continue
        node = _clamp(constants, value, top, opset)
        while node.name in names:
            node.name = f"{node.name}_"
        names.add(node.name)
        stripped.replace(value, node.outputs[0])
        count += 1
    if not count:
        return []
    return [
        f"{count} Relu or Clip put back in front of tensors without codes below zero: the file "
        "leaves them to the clamp of the quantization"
    ]


def _end(value: ir.Value, tap: Tap) -> float | None:
    """Return where the codes of a tensor end, if they start at 0 and it may have other signs."""
    node, spec, qparams = value.producer(), tap.reading.spec, tap.reading.qparams
    if node is None or node.domain or node.op_type not in SIGNED or value.is_graph_output():
        return None
    if spec.axis is not None or not spec.dtype.is_integer or qparams.zero_point.numel() != 1:
        return None
    if int(qparams.zero_point) != spec.dtype.qmin:
        return None
    return float((qparams.scale * (spec.dtype.qmax - spec.dtype.qmin)).reshape(()))


def _clamp(constants: Constants, value: ir.Value, top: float, opset: int) -> ir.Node:
    """Insert the operator behind the producer of ``value``; all that read this read its result."""
    producer = value.producer()
    assert producer is not None
    graph, name = producer.graph, value.name or "tensor"
    assert isinstance(graph, ir.Graph)
    attributes: list[ir.Attr] = []
    bounds: list[ir.Value] = []
    kind = "Clip" if abs(top - SIX) <= 1e-5 * SIX else "Relu"
    if kind == "Clip" and opset < CLIP_INPUTS:
        attributes = [ir.AttrFloat32("min", 0.0), ir.AttrFloat32("max", top)]
    elif kind == "Clip":
        ends = {f"{name}_low": 0.0, f"{name}_high": top}
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        bounds = [
            constants.add(graph, constants.unique_name(end), np.array(number, dtype))
            for end, number in ends.items()
        ]
    node = ir.Node("", kind, [value, *bounds], attributes, num_outputs=1, name=f"{name}_{kind}")
    result = node.outputs[0]
    result.type, result.shape = value.type, value.shape
    value.replace_all_uses_with(result)
    node.replace_input_with(0, value)
    graph.insert_after(producer, node)
    value.name, result.name = constants.unique_name(f"{name}_unclamped"), name
    return node
