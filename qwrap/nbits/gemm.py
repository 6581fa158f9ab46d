"""Gemm with a constant: MatMulNBits with a bias, or a blocked DequantizeLinear before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwrap.model.tensors import to_numpy
from qwrap.nbits.draft import Draft, Weight
from qwrap.nbits.matmul import named, operator_node
from qwrap.nbits.matrices import attribute, check_matrix, outputs_first
from qwrap.nbits.parts import parts_of
from qwrap.nbits.request import Request
from qwrap.nbits.unfit import Unfit


def quantize_gemm(draft: Draft, node: ir.Node, request: Request) -> str:
    """Replace a Gemm whose second input is a constant, in place; return what was made of it.

    As an operator it is a MatMulNBits, behind a Transpose if it transposes its input. ``alpha``
    goes into the scales; ``beta * C`` is its bias if it is a constant for each output, or else
    added. As a pair the Gemm stays, and reads what a DequantizeLinear makes.

    Raises:
        Unfit: the node stays as it is; the message says why.
    """
    weight = draft.weight(node.inputs[1])
    if weight is None:
        raise Unfit("its second input is no constant of a float type")
    check_matrix(node, weight)
    if request.form == "operator":
        nodes = _operator(draft, node, weight, request)
        what = " and ".join(dict.fromkeys(n.op_type for n in nodes if n.op_type != "Transpose"))
    elif request.form == "qdq":
        nodes, what = pair(draft, node, weight, request), "DequantizeLinear and Gemm"
    else:
        raise Unfit("MatMulBnb4 takes the place of MatMul only")
    draft.replace(node, nodes)
    form = request.format
    inputs = weight.shape[1 if outputs_first(node) else 0]
    return f"{what}, {form.text}, blocks of {form.block_size or inputs}"


def _operator(draft: Draft, node: ir.Node, weight: Weight, request: Request) -> list[ir.Node]:
    given, stem, nodes = node.inputs[0], node.outputs[0].name, list[ir.Node]()
    assert given is not None
    if attribute(node, "transA", 0):
        name = named(node, "_transposed")
        nodes.append(draft.node("Transpose", [given], f"{stem}_input", name=name))
        nodes[-1].attributes["perm"] = ir.AttrInt64s("perm", [1, 0])
        given = nodes[-1].outputs[0]
    bias = _bias(draft, node, weight)
    nodes.append(operator_node(draft, node, given, weight, request, bias))
    if bias is None and (rest := _rest(node)) is not None:
        nodes += _added(draft, node, weight, nodes[-1].outputs[0], rest)
    return nodes


def _rest(node: ir.Node) -> ir.Value | None:
    """Return what is added, None for nothing."""
    rest = node.inputs[2] if len(node.inputs) > 2 else None
    return rest if attribute(node, "beta", 1.0) else None


def _bias(draft: Draft, node: ir.Node, weight: Weight) -> ir.Value | None:
    """Return ``beta * C`` as an initialiser ``[N]``, None if it is no constant for each output."""
    constant = draft.weight(_rest(node))
    outputs = weight.shape[0 if outputs_first(node) else 1]
    if constant is None or any(n != 1 for n in constant.shape[:-1]):
        return None
    if constant.shape and constant.shape[-1] not in (1, outputs):
        return None
    beta = attribute(node, "beta", 1.0)
    key = ("bias", constant.value, constant.turned, beta, outputs)
    if key not in draft.made:
        values = constant.read()
        vector = (values.double() * beta).to(values.dtype).reshape(-1).expand(outputs).contiguous()
        draft.made[key] = draft.constant(constant.graph, f"{constant.name}_bias", to_numpy(vector))
    made: ir.Value = draft.made[key]
    return made


def _added(
    draft: Draft, node: ir.Node, weight: Weight, product: ir.Value, rest: ir.Value
) -> list[ir.Node]:
    """Return nodes that add ``beta`` times a tensor to a product."""
    stem, nodes, beta = node.outputs[0].name, list[ir.Node](), attribute(node, "beta", 1.0)
    if beta != 1:
        number = np.asarray(beta, weight.tensor.dtype.numpy())
        factor = draft.constant(weight.graph, f"{stem}_beta", number)
        name = named(node, "_beta")
        nodes.append(draft.node("Mul", [rest, factor], f"{stem}_scaled", name=name))
        rest = nodes[-1].outputs[0]
    name = named(node, "_add")
    return [*nodes, draft.node("Add", [product, rest], f"{stem}_sum", name=name)]


def pair(draft: Draft, node: ir.Node, weight: Weight, request: Request) -> list[ir.Node]:
    """Return a Gemm that reads what a DequantizeLinear with blocks makes.

    Raises:
        Unfit: the weight is not finite.
    """
    rows = outputs_first(node)
    inputs = weight.shape[1 if rows else 0]
    names, graph = request.names(weight.name, inputs), node.graph
    assert isinstance(graph, ir.Graph)
    parts = parts_of(draft, node, weight, request, names, graph, outputs_first=rows)
    key, nodes = (parts[0], graph), list[ir.Node]()
    if key not in draft.made:
        made = draft.node(
            "DequantizeLinear",
            tuple(draft.constant_in(graph, part) for part in parts),
            f"{parts[0].name}_output",
            name=named(node, names.node),
            attributes={"axis": int(rows), "block_size": request.format.block_size or inputs},
        )
        nodes, draft.made[key] = [made], made.outputs[0]
    product = draft.node(
        "Gemm",
        [node.inputs[0], draft.made[key], *node.inputs[2:]],
        f"{node.outputs[0].name}_pre_reshape",
        name=named(node, f"_gemm_Q{request.format.bits}"),
    )
    product.attributes.update(node.attributes)
    return [*nodes, product]
