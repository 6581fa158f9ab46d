"""MatMul of a constant: MatMulNBits, or a blocked DequantizeLinear before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qwrap.nbits.blocks import Blocks
from qwrap.nbits.bnb4 import Kind, float4_key, float4_node
from qwrap.nbits.draft import MICROSOFT, Draft, Weight
from qwrap.nbits.packing import operator_arrays, pair_arrays
from qwrap.nbits.request import Naming, Request
from qwrap.nbits.rtn import round_to_nearest
from qwrap.nbits.unfit import Unfit

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256


def quantize_matmul(draft: Draft, node: ir.Node, request: Request) -> str:
    """Replace a MatMul whose second input is a constant, in place; return what was made of it.

    Raises:
        Unfit: the node stays as it is; the message says why.
    """
    weight = draft.weight(node.inputs[1])
    if weight is None:
        raise Unfit("its second input is no constant of a float type")
    _check(weight)
    if request.form == "operator":
        nodes = _operator(draft, node, weight, request)
    elif request.form == "qdq":
        nodes = _pair(draft, node, weight, request)
    else:
        nodes = _float4(draft, node, weight, request.format.block_size, request.form)
    result = nodes[-1].op_type
    nodes += _restore_rank(draft, node, weight, nodes[-1])
    draft.replace(node, nodes)
    form = request.format
    return f"{result}, {form.text}, blocks of {form.block_size or weight.shape[-2]}"


def _check(weight: Weight) -> None:
    shape = weight.shape
    if weight.tensor.dtype == ir.DataType.DOUBLE:
        raise Unfit(f"weight {weight.name!r} is of float64, which MatMulNBits does not take")
    if len(shape) < 2 or any(n != 1 for n in shape[:-2]):
        raise Unfit(f"weight {weight.name!r} {list(shape)} is not one matrix")
    if 0 in shape:
        raise Unfit(f"weight {weight.name!r} {list(shape)} is empty")


def matrix_of(weight: Weight) -> Tensor:
    """Return the weight of a MatMul as ``[N, K]``.

    Raises:
        Unfit: some of its values are not finite.
    """
    values = weight.read()
    low, high = values.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise Unfit(f"weight {weight.name!r} has values that are not finite")
    return values.reshape(values.shape[-2:]).mT


def _blocks(weight: Weight, request: Request) -> Blocks:
    """Return codes of a weight.

    onnxruntime 1.31 has no kernel for 8 bits with float zero points: it loads the file and fails
    when it is run. At 8 bits there is little to gain over rounding to nearest, which is done then.
    """
    matrix, form = matrix_of(weight), request.format
    blocks = request.method(matrix, form, request.statistics)
    zero_point = blocks.zero_point
    if form.bits == 8 and zero_point is not None and zero_point.is_floating_point():
        return round_to_nearest(matrix, replace(form, symmetric=False))
    return blocks


# --- MatMulNBits ---------------------------------------------------------------------------------


def is_block(size: int, op_type: str = "MatMul") -> bool:
    """Whether a kernel of onnxruntime takes blocks of this size.

    MatMulNBits and MatMulBnb4 take a power of 2 from 16 to 256, GatherBlockQuantized any from 16.
    """
    largest = LARGEST_BLOCK if op_type == "MatMul" else size
    return SMALLEST_BLOCK <= size <= largest and size & (size - 1) == 0


def _operator(draft: Draft, node: ir.Node, weight: Weight, request: Request) -> list[ir.Node]:
    inputs, outputs = weight.shape[-2:]
    names, form = request.names(weight.name, inputs), request.format
    parts = _once(draft, weight, request, names, weight.graph)
    attributes = {
        "K": inputs,
        "N": outputs,
        "bits": form.stored_bits,
        "block_size": form.block_size,
    }
    if request.accuracy_level:
        attributes["accuracy_level"] = request.accuracy_level
    made = draft.node(
        "MatMulNBits",
        [node.inputs[0], *parts],
        f"{node.outputs[0].name}_pre_reshape",
        name=_named(node, names.node),
        domain=MICROSOFT,
        attributes=attributes,
    )
    return [made]


def _once(
    draft: Draft, weight: Weight, request: Request, names: Naming, graph: ir.Graph
) -> tuple[ir.Value, ...]:
    """Return the quantized parts of a weight; the first node to want them has them in ``graph``."""
    key = (weight.value, weight.turned, replace(request, accuracy_level=0))
    if key not in draft.made:
        blocks = _blocks(weight, request)
        if request.form == "operator":
            arrays = operator_arrays(blocks)
        else:
            arrays = pair_arrays(blocks, transposed=request.transposed)
        draft.made[key] = tuple(
            draft.constant(graph, getattr(names, part), array) for part, array in arrays.items()
        )
    parts: tuple[ir.Value, ...] = draft.made[key]
    return parts


def _named(node: ir.Node, suffix: str) -> str:
    return f"{node.name}{suffix}" if node.name else ""


# --- MatMulBnb4 ----------------------------------------------------------------------------------


def _float4(draft: Draft, node: ir.Node, weight: Weight, size: int, kind: Kind) -> list[ir.Node]:
    is_new = float4_key(weight, size, kind) not in draft.made
    matrix = matrix_of(weight) if is_new else None
    return [float4_node(draft, node, weight, matrix, size, kind)]


# --- DequantizeLinear ----------------------------------------------------------------------------


def _pair(draft: Draft, node: ir.Node, weight: Weight, request: Request) -> list[ir.Node]:
    names = request.names(weight.name, weight.shape[-2])
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    parts = _once(draft, weight, request, names, graph)
    # One in each graph that wants it: onnxruntime fuses a pair only with codes of the same graph,
    # and refuses the file if they are further out.
    key = (parts[0], graph)
    nodes: list[ir.Node] = []
    if key not in draft.made:
        inner = tuple(draft.constant_in(graph, part) for part in parts)
        nodes = _dequantize(draft, node, weight.shape[-2], request, inner, names)
        draft.made[key] = nodes[-1].outputs[0]
    product = draft.node(
        "MatMul",
        [node.inputs[0], draft.made[key]],
        f"{node.outputs[0].name}_pre_reshape",
        name=_named(node, f"_matmul_Q{request.format.bits}"),
    )
    return [*nodes, product]


def _dequantize(
    draft: Draft,
    node: ir.Node,
    inputs: int,
    request: Request,
    parts: tuple[ir.Value, ...],
    names: Naming,
) -> list[ir.Node]:
    block = request.format.block_size or inputs
    made = draft.node(
        "DequantizeLinear",
        parts,
        f"{parts[0].name}_output",
        name=_named(node, names.node),
        attributes={"axis": 1 if request.transposed else 0, "block_size": block},
    )
    if not request.transposed:
        return [made]
    turned = draft.node("Transpose", made.outputs, f"{made.outputs[0].name}_transposed")
    turned.attributes["perm"] = ir.AttrInt64s("perm", [1, 0])
    return [made, turned]


# --- ranks ---------------------------------------------------------------------------------------


def _restore_rank(draft: Draft, node: ir.Node, weight: Weight, product: ir.Node) -> list[ir.Node]:
    """Return nodes that give a product with ``[K, N]`` the rank it has with ``[1, ..., K, N]``."""
    rank, given = len(weight.shape), node.inputs[0]
    assert given is not None
    known = draft.type_of(given).rank
    if rank == 2 or (known is not None and known >= rank):
        return []
    stem = f"{node.name or node.outputs[0].name}_rank"
    nodes: list[ir.Node] = []
    if known is not None:
        ones = np.ones(rank if known > 1 else rank - 1, np.int64)  # a vector's product lacks one
        shape = draft.constant(weight.graph, stem, ones)
    else:
        # A product with a column of zeros has the shape that is wanted, but for its last dimension.
        column = np.zeros((*weight.shape[:-1], 1), weight.tensor.dtype.numpy())
        zeros = draft.constant(weight.graph, f"{stem}_zeros", column)
        like = draft.node("MatMul", [given, zeros], f"{stem}_like", name=f"{stem}_MatMul")
        nodes = [like, draft.node("Shape", like.outputs, stem, name=f"{stem}_Shape")]
        shape = nodes[-1].outputs[0]
    return [
        *nodes,
        draft.node("Expand", [product.outputs[0], shape], f"{stem}d", name=f"{stem}_Expand"),
    ]
