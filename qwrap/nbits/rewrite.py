"""Replace the nodes that were asked for, wherever they are in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import onnx
import onnx_ir as ir

from qwrap.graph.index import opset_of, walk_nodes
from qwrap.graph.nodes import STANDARD
from qwrap.graph.opset import raise_opset
from qwrap.nbits.conv import quantize_conv
from qwrap.nbits.draft import Draft, Store, in_memory
from qwrap.nbits.gather import quantize_gather
from qwrap.nbits.gemm import quantize_gemm
from qwrap.nbits.matmul import quantize_matmul
from qwrap.nbits.matrices import WEIGHT_INPUT
from qwrap.nbits.request import Choose, Request
from qwrap.nbits.unfit import Unfit

Rewrite = Callable[[Draft, ir.Node, Request], str]
REWRITES: Mapping[str, Rewrite] = {
    "MatMul": quantize_matmul,
    "Gemm": quantize_gemm,
    "Conv": quantize_conv,
    "Gather": quantize_gather,
}
"""Operators whose weights can be quantized, and what does it."""


class Report(Protocol):
    """What is told of each node."""

    def add(self, name: str, op_type: str, quantized: bool, reason: str = "") -> None:
        """Note what became of a node."""


class _Silent:
    def add(self, name: str, op_type: str, quantized: bool, reason: str = "") -> None:
        """Note nothing."""


def rewrite(
    model: ir.Model,
    choose: Choose,
    store: Store = in_memory,
    report: Report | None = None,
    *,
    through_transpose: bool = True,
) -> None:
    """Quantize weights of ``model``, in place, one after the other.

    Bodies of control flow are entered; functions of the model are left alone. A weight that
    several nodes read becomes one set of codes. The opset rises where int4 or int2 needs that.

    Args:
        model: what to edit.
        choose: what to make of a node that has an operator of ``REWRITES``; None leaves it.
        store: keeps what is to be an initialiser.
        report: is told of each node of the graph.
        through_transpose: whether a weight may lie behind a Transpose, as that of a last layer does
            which is tied to a table.

    Raises:
        ExportError: the model cannot be raised to the opset that the codes need.
    """
    report = report or _Silent()
    nodes = list(walk_nodes(model.graph))
    chosen = {n: r for n in nodes if is_candidate(n) and (r := choose(n)) is not None}
    draft = Draft(model, store, through_transpose=through_transpose)
    raise_for(draft, chosen)
    if any(_is_deep(draft, node) for node in chosen):
        draft.learn_types()
    for node in nodes:
        name = node.name or next((value.name for value in node.outputs if value.name), "")
        op_type = node.op_type
        if node not in chosen:
            report.add(name, op_type, False, "not asked for")
            continue
        try:
            made = REWRITES[op_type](draft, node, chosen[node])
            note = chosen[node].note()
            report.add(name, op_type, True, f"{made}; {note}" if note else made)
        except Unfit as reason:
            report.add(name, op_type, False, str(reason))


def is_candidate(node: ir.Node) -> bool:
    """Whether there is a way to quantize a node of this operator."""
    return node.op_type in REWRITES and node.domain in STANDARD


def _is_deep(draft: Draft, node: ir.Node) -> bool:
    weight = draft.weight(node.inputs[WEIGHT_INPUT[node.op_type]])
    return node.op_type == "MatMul" and weight is not None and len(weight.shape) > 2


def _has_typed_codes(node: ir.Node, request: Request) -> bool:
    """Whether codes become tensors of small integers, and not of bytes."""
    if node.op_type == "Gather":
        return request.form == "qdq" or request.format.stored_bits == 4
    return request.form == "qdq" or node.op_type == "Conv"


def raise_for(draft: Draft, chosen: Mapping[ir.Node, Request]) -> None:
    """Let the model import the opset in which its codes will be tensors, in place."""
    is_added = any(n.op_type == "Gemm" and r.form == "operator" for n, r in chosen.items())
    # Before opset 7 Add does not broadcast by itself, and 11 is the first to which a model rises.
    needed = [11] if is_added and opset_of(draft.model, "") < 7 else []
    needed += [
        25 if request.format.bits == 2 else 21
        for node, request in chosen.items()
        if draft.weight(node.inputs[WEIGHT_INPUT[node.op_type]]) is not None
        and _has_typed_codes(node, request)
    ]
    if not needed:
        return
    model, opset = draft.model, max(needed)
    if opset_of(model, "") < opset:
        raise_opset(model, opset)
    found = onnx.helper.make_opsetid("", opset)
    version = onnx.helper.find_min_ir_version_for([found])
    model.ir_version = max(model.ir_version, version)
