"""Conv with a constant kernel: a DequantizeLinear before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.nbits.blocks import Blocks
from qwrap.nbits.draft import Array, Draft, Weight
from qwrap.nbits.matmul import named
from qwrap.nbits.matrices import check_matrix
from qwrap.nbits.packing import pair_arrays
from qwrap.nbits.parts import blocks_of
from qwrap.nbits.request import Request
from qwrap.nbits.unfit import Unfit


def quantize_conv(draft: Draft, node: ir.Node, request: Request) -> str:
    """Let a Conv read dequantized codes, in place; return what was made of it.

    A kernel is a matrix with a row for each output, of its inputs and positions in the order of
    ONNX. With one block a row, codes keep the shape of the kernel and have a scale for each output.
    With several, they are that matrix, with blocks along its rows, and a Reshape is behind. No
    kernel of onnxruntime multiplies them: the file is smaller, and the Conv computes in float.

    Raises:
        Unfit: the node stays as it is; the message says why.
    """
    weight = draft.weight(node.inputs[1])
    if weight is None:
        raise Unfit("its second input is no constant of a float type")
    check_matrix(node, weight)
    if request.form not in ("operator", "qdq"):
        raise Unfit("there is no Conv of 4-bit floats")
    inputs, form = int(np.prod(weight.shape[1:])), request.format
    size = min(form.block_size or inputs, inputs)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    key, nodes = (weight.value, weight.turned, "Conv", request, graph), list[ir.Node]()
    if key not in draft.made:
        nodes = _dequantized(draft, node, weight, request, size)
        draft.made[key] = nodes[-1].outputs[0]
    product = draft.node(
        "Conv",
        [node.inputs[0], draft.made[key], *node.inputs[2:]],
        f"{node.outputs[0].name}_pre_reshape",
        name=named(node, f"_conv_Q{form.bits}"),
    )
    product.attributes.update(node.attributes)
    draft.replace(node, [*nodes, product])
    blocks = "a scale for each output" if size == inputs else f"blocks of {size}"
    return f"DequantizeLinear and Conv, {form.text}, {blocks}"


def _dequantized(
    draft: Draft, node: ir.Node, weight: Weight, request: Request, size: int
) -> list[ir.Node]:
    graph, shape = node.graph, weight.shape
    assert isinstance(graph, ir.Graph)
    names = request.names(weight.name, size)
    whole = size == int(np.prod(shape[1:]))
    made = ("Conv codes", weight.value, weight.turned, request)
    if made not in draft.made:
        arrays = _arrays(blocks_of(node, weight, request), shape if whole else None)
        draft.made[made] = [
            draft.constant(graph, getattr(names, part), array) for part, array in arrays.items()
        ]
    parts = [draft.constant_in(graph, part) for part in draft.made[made]]
    dequantized = draft.node(
        "DequantizeLinear",
        parts,
        f"{parts[0].name}_output",
        name=named(node, names.node),
        attributes={"axis": 0} if whole else {"axis": 1, "block_size": size},
    )
    if whole:
        return [dequantized]
    sizes = draft.constant(graph, f"{weight.name}_shape", np.array(shape, np.int64))
    reshaped = [dequantized.outputs[0], sizes]
    name = named(node, "_kernel")
    return [dequantized, draft.node("Reshape", reshaped, f"{parts[0].name}_kernel", name=name)]


def _arrays(blocks: Blocks, shape: tuple[int, ...] | None) -> dict[str, Array]:
    """Return codes as a matrix, or with a ``shape`` in that and one scale for each output."""
    arrays = dict[str, Array](pair_arrays(blocks, transposed=True).items())
    if shape is not None:
        arrays = {part: array.reshape(-1) for part, array in arrays.items()}
        arrays["codes"] = arrays["codes"].reshape(shape)
    return arrays
