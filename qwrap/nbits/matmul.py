"""MatMul of a constant: MatMulNBits, or a blocked DequantizeLinear before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.nbits.bnb4 import Kind, float4_key, float4_node
from qwrap.nbits.draft import MICROSOFT, Draft, Weight
from qwrap.nbits.matrices import check_matrix, matrix_of, outputs_first
from qwrap.nbits.parts import parts_of
from qwrap.nbits.request import Naming, Request
from qwrap.nbits.unfit import Unfit

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
BIAS = 5  # which input of MatMulNBits that is


def quantize_matmul(draft: Draft, node: ir.Node, request: Request) -> str:
    """Replace a MatMul whose second input is a constant, in place; return what was made of it.

    Raises:
        Unfit: the node stays as it is; the message says why.
    """
    weight = draft.weight(node.inputs[1])
    if weight is None:
        raise Unfit("its second input is no constant of a float type")
    check_matrix(node, weight)
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


# --- MatMulNBits ---------------------------------------------------------------------------------


def is_block(size: int, op_type: str = "MatMul") -> bool:
    """Whether a kernel of onnxruntime takes blocks of this size.

    MatMulNBits and MatMulBnb4 take a power of 2 from 16 to 256, GatherBlockQuantized any from 16.
    """
    largest = LARGEST_BLOCK if op_type == "MatMul" else size
    return SMALLEST_BLOCK <= size <= largest and size & (size - 1) == 0


def _operator(draft: Draft, node: ir.Node, weight: Weight, request: Request) -> list[ir.Node]:
    given = node.inputs[0]
    assert given is not None
    return [operator_node(draft, node, given, weight, request)]


def operator_node(
    draft: Draft,
    node: ir.Node,
    given: ir.Value,
    weight: Weight,
    request: Request,
    bias: ir.Value | None = None,
) -> ir.Node:
    """Return a MatMulNBits for a MatMul or Gemm.

    Args:
        draft: gets the initialisers.
        node: gives way to it.
        given: what it multiplies with the weight.
        weight: ``[K, N]``.
        request: how the weight is quantized.
        bias: ``[N]``, which is added.

    Raises:
        Unfit: the weight is not finite.
    """
    inputs, outputs = weight.shape[-2:]
    if outputs_first(node):
        inputs, outputs = outputs, inputs
    names, form = request.names(weight.name, inputs), request.format
    parts: list[ir.Value | None] = list(parts_of(draft, node, weight, request, names, weight.graph))
    if bias is not None:
        parts += [None] * (BIAS - 1 - len(parts))
        parts.append(bias)
    sizes = {"K": inputs, "N": outputs, "bits": form.stored_bits, "block_size": form.block_size}
    if request.accuracy_level:
        sizes["accuracy_level"] = request.accuracy_level
    return draft.node(
        "MatMulNBits",
        [given, *parts],
        f"{node.outputs[0].name}_pre_reshape",
        name=named(node, names.node),
        domain=MICROSOFT,
        attributes=sizes,
    )


def named(node: ir.Node, suffix: str) -> str:
    """Return the name of what takes the place of a node."""
    return f"{node.name}{suffix}" if node.name else ""


# --- MatMulBnb4 ----------------------------------------------------------------------------------


def _float4(draft: Draft, node: ir.Node, weight: Weight, size: int, kind: Kind) -> list[ir.Node]:
    is_new = float4_key(weight, size, kind) not in draft.made
    matrix = matrix_of(node, weight) if is_new else None
    return [float4_node(draft, node, weight, matrix, size, kind)]


# --- DequantizeLinear ----------------------------------------------------------------------------


def _pair(draft: Draft, node: ir.Node, weight: Weight, request: Request) -> list[ir.Node]:
    names = request.names(weight.name, weight.shape[-2])
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    parts = parts_of(draft, node, weight, request, names, graph, outputs_first=request.transposed)
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
        name=named(node, f"_matmul_Q{request.format.bits}"),
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
        name=named(node, names.node),
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
