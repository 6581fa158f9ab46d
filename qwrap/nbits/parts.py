"""The quantized parts of a weight, made once for all nodes that read it."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qwrap.nbits.blocks import Blocks
from qwrap.nbits.draft import Draft, Weight
from qwrap.nbits.matrices import attribute, matrix_of
from qwrap.nbits.matrices import outputs_first as reads_rows
from qwrap.nbits.packing import operator_arrays, pair_arrays
from qwrap.nbits.request import Naming, Request
from qwrap.nbits.rtn import round_to_nearest


def parts_of(
    draft: Draft,
    node: ir.Node,
    weight: Weight,
    request: Request,
    names: Naming,
    graph: ir.Graph,
    *,
    outputs_first: bool = False,
) -> tuple[ir.Value, ...]:
    """Return codes, scales and perhaps zero points; the first to want them has them in ``graph``.

    Args:
        draft: being edited.
        node: reads the weight.
        weight: of the node.
        request: how it is quantized.
        names: of the parts.
        graph: gets them.
        outputs_first: of pairs, whether the codes lie as ``[N, K]``.

    Raises:
        Unfit: the weight is not finite.
    """
    alpha = _alpha(node) if request.form == "operator" else 1.0
    layout = weight.turned, outputs_first, alpha
    key = (weight.value, layout, reads_rows(node), replace(request, accuracy_level=0))
    if key not in draft.made:
        blocks = blocks_of(node, weight, request)
        if request.form == "operator":
            arrays = operator_arrays(scaled(blocks, alpha))
        else:
            arrays = pair_arrays(blocks, transposed=outputs_first)
        draft.made[key] = tuple(
            draft.constant(graph, getattr(names, part), array) for part, array in arrays.items()
        )
    parts: tuple[ir.Value, ...] = draft.made[key]
    return parts


def _alpha(node: ir.Node) -> float:
    return attribute(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0


def blocks_of(node: ir.Node, weight: Weight, request: Request) -> Blocks:
    """Return codes of a weight.

    onnxruntime 1.31 has no kernel for 8 bits with float zero points: it loads the file and fails
    when it is run. At 8 bits there is little to gain over rounding to nearest, which is done then.

    Raises:
        Unfit: the weight is not finite.
    """
    if request.learned is not None:
        return request.learned()
    matrix, form = matrix_of(node, weight), request.format
    blocks = request.method(matrix, form, request.statistics)
    zero_point = blocks.zero_point
    if form.bits == 8 and zero_point is not None and zero_point.is_floating_point():
        return round_to_nearest(matrix, replace(form, symmetric=False))
    return blocks


def scaled(blocks: Blocks, factor: float) -> Blocks:
    """Return codes of the matrix times a number."""
    if factor == 1:
        return blocks
    return replace(blocks, scale=(blocks.scale.double() * factor).to(blocks.scale.dtype))
