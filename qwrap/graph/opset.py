"""Raise the opset that a model imports, touching only the nodes that have to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.graph.canonical import ROI_OPTIONAL
from qwrap.graph.constants import label
from qwrap.graph.index import ValueType, opset_of, walk_nodes
from qwrap.graph.load import to_model
from qwrap.graph.opset_adapters import ADAPTERS
from qwrap.graph.opset_edit import Editor, known_types, refuse

ONNX_DOMAINS = ("", "ai.onnx")
OLDEST_TARGET = 11  # Resize-10 cannot say which pixels an Upsample took

# Operator revisions that extend types, allow more (negative axes, new optional inputs and
# attributes whose default is what was before), or say more clearly what held before. A node of
# the revision before needs no change. Listed one by one: a revision that is not here, not in
# ADAPTERS and not in REFUSED is one that nobody has looked at, and is refused.
#
# Three that look otherwise: ConvTranspose-11 says where the odd element of an automatic padding
# goes, which runtimes did before as well; OneHot-11 gives a meaning to negative indices, which
# before "must be non-negative"; Attention-24 words its causal mask anew, but without the new
# input it is the same.
_COMPATIBLE: dict[tuple[int, ...], str] = {
    (3, 14, 22): "GRU",
    (6, 9, 11, 13): "Gemm",
    (7, 10, 11, 19, 22): "AveragePool",
    (8, 10, 11, 12, 22): "MaxPool",
    (8, 12, 13): "Max Min",
    (8, 13): "Mean Sum",
    (9, 11, 12, 13, 19, 21, 23, 24, 25): "Constant",
    (9, 11, 13, 21, 23, 24, 25): "Flatten",
    (9, 13): "Greater Less MatMul",
    (9, 13, 19, 21, 23, 24, 25, 28): "Cast",
    (9, 16): "PRelu",
    (11,): "Hardmax LogSoftmax NonMaxSuppression ReduceSum Softmax Split",
    (11, 12, 13): "ArgMax ArgMin",
    (11, 12, 13, 20): "ReduceMax ReduceMin",
    (11, 13): (
        "Concat Gather ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd "
        "ReduceSumSquare Slice"
    ),
    (11, 13, 16, 19, 21, 23, 24, 25): "If Loop",
    (11, 13, 19): "Equal",
    (11, 13, 28): "DepthToSpace",
    (11, 16, 19, 21, 23, 24, 25): "Scan",
    (11, 18, 22): "LpPool",
    (11, 21, 23, 24, 25): "Squeeze Unsqueeze",
    (11, 22): "Conv ConvTranspose MaxUnpool",
    (11, 24): "TopK",
    (11, 28): "Compress OneHot",
    (12, 13): "Clip GatherND",
    (12, 13, 15): "Pow",
    (13,): (
        "Abs Ceil Exp Expand Floor GatherElements LRN Log MeanVarianceNormalization Neg NonZero "
        "Reciprocal Sigmoid Sign SoftmaxCrossEntropyLoss Sqrt Tanh Tile"
    ),
    (13, 14): "Add Div Mul Relu Sub",
    (13, 14, 16, 19, 21, 23, 24, 25): "Identity",
    (13, 14, 19, 21, 23, 24, 25): "Reshape",
    (13, 15, 19, 21, 23, 24, 25): "Shape",
    (13, 16, 18): "ScatterElements ScatterND",
    (13, 18, 19, 21, 23, 24, 25): "Pad",
    (13, 19, 21, 23, 24, 25): "Size",
    (13, 19, 21, 23, 24, 25, 28): "DequantizeLinear QuantizeLinear",
    (13, 20): "IsNaN",
    (13, 21, 23, 24, 25): "Transpose",
    (13, 22): "Dropout NegativeLogLikelihoodLoss",
    (13, 28): "Mod SpaceToDepth",
    (14,): "CumSum",
    (14, 22): "LSTM RNN",
    (15,): "BatchNormalization",
    (16,): "GreaterOrEqual LeakyRelu LessOrEqual Where",
    (18, 19): "Resize",
    (18, 28): "OptionalGetElement OptionalHasElement",
    (19, 21, 23, 24, 25): "CastLike",
    (20,): "IsInf",
    (20, 21, 23, 24, 25): "ConstantOfShape",
    (21,): "QLinearMatMul",
    (22,): (
        "Acos Acosh Asin Asinh Atan Atanh Bernoulli Cos Cosh DeformConv Det Elu EyeLike "
        "GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample HardSigmoid HardSwish "
        "InstanceNormalization LpNormalization MaxRoiPool Mish Multinomial RandomNormal "
        "RandomNormalLike RandomUniform RandomUniformLike RoiAlign Round Selu Sin Sinh Softplus "
        "Softsign Tan ThresholdedRelu"
    ),
    (24,): "SplitToSequence",
    (24, 25): "Attention",
    (27,): "Range",
    (28,): "BitShift Celu Einsum Optional ReverseSequence Unique",
}
COMPATIBLE = frozenset(
    (op, revision)
    for revisions, ops in _COMPATIBLE.items()
    for op in ops.split()
    for revision in revisions
)
REFUSED = {
    ("Scan", 9): "Scan-8 had a batch dimension and sequence lengths",
    ("Tile", 6): "Tile-1 repeated along one axis that it read at run time",
}


def raise_opset(model: ir.Model, target: int) -> list[str]:
    """Let ``model`` import ai.onnx ``target``, in place; it computes the same.

    Only nodes whose form or meaning has changed since the opset the model imports are edited, in
    subgraphs and in the model's functions too. Nodes and values keep their names; what is added
    is named after the node it is for. Other domains are left alone, and nothing is lowered. The
    IR version rises to 4 if an older model needs a new initialiser, which then needs to be no
    graph input.

    Args:
        model: what to edit; imports any opset, as does each of its functions.
        target: version of ai.onnx, 11 or later, that the installed onnx knows.

    Returns:
        A line for each node that was edited; nothing if the model imports ``target`` or later.

    Raises:
        ExportError: ``target`` is out of range, or some nodes have no equal there; the message
            lists all of them, and the model is unchanged.

    Source: the changelog of ONNX operators, https://onnx.ai/onnx/operators/, and for Resize-10
    and Upsample, which it leaves open, the backend tests of ONNX 1.5 and onnxruntime.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_TARGET <= target <= newest:
        raise ExportError(
            f"opset {target}: not between {OLDEST_TARGET} and {newest}, the newest onnx knows"
        )
    if not any(before < target for _, before in _scopes(model)):
        return []
    types = known_types(model)
    _, problems = _raise(
        model.clone(), types, target
    )  # what an adapter refuses depends on the node
    if problems:
        raise ExportError(
            f"the model cannot be raised from opset {opset_of(model, '')} to {target}; export it "
            "again with a later opset, or use the com.microsoft domain: " + "; ".join(problems)
        )
    lines, _ = _raise(model, types, target)
    if target < ROI_OPTIONAL:
        _give_regions(model, types)
    return lines


def raised_message(proto: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """Return ``proto``, which stays as it is, with ai.onnx ``target``; see ``raise_opset``.

    Raises:
        ExportError: as ``raise_opset``.
    """
    model = to_model(proto, None, is_original=False)
    raise_opset(model, target)
    return ir.to_proto(model)


def _give_regions(model: ir.Model, types: Mapping[str, ValueType]) -> None:
    """Give each Resize the empty region input that opsets before 13 ask for, in place."""
    edit = Editor(model, types)
    for node in [n for n in walk_nodes(model.graph) if n.op_type == "Resize" and not n.domain]:
        if len(node.inputs) > 2 and node.inputs[1] is None:
            edit.give(node, 1, "roi", np.empty(0, np.float32))


def _scopes(model: ir.Model) -> Iterator[tuple[ir.Graph | ir.Function, int]]:
    yield model.graph, opset_of(model, "")
    for function in model.functions.values():
        for domain in ONNX_DOMAINS:
            if domain in function.opset_imports:
                yield function, function.opset_imports[domain]


def _raise(
    model: ir.Model, types: Mapping[str, ValueType], target: int
) -> tuple[list[str], list[str]]:
    """Edit ``model`` as far as possible; return what was edited and what could not be."""
    edit = Editor(model, types)
    lines: list[str] = []
    problems: list[str] = []
    for scope, before in list(_scopes(model)):
        if before >= target:
            continue
        graph = scope.graph if isinstance(scope, ir.Function) else scope
        for node in [n for n in walk_nodes(graph) if n.domain in ONNX_DOMAINS]:
            done, problem = _try_node(edit, node, before, target)
            lines += done
            problems += problem
        imports = scope.opset_imports
        imports["ai.onnx" if "ai.onnx" in imports else ""] = target
    return lines, problems


def _try_node(edit: Editor, node: ir.Node, before: int, target: int) -> tuple[list[str], list[str]]:
    try:
        return _raise_node(edit, node, before, target), []
    except ExportError as error:
        return [], [str(error)]


def _raise_node(edit: Editor, node: ir.Node, before: int, target: int) -> list[str]:
    """Take ``node``, in place, through each revision up to ``target``; say so if it changed."""
    if not any(r <= before for r in revisions(node.op_type)):
        raise refuse(node, f"ai.onnx {before} has no such operator")
    name, current, changed = label(node), before, False
    while (revision := _next_revision(node.op_type, current, target)) is not None:
        step = node.op_type, revision
        if step in ADAPTERS:
            changed |= ADAPTERS[step](edit, node)
        elif step not in COMPATIBLE:
            why = REFUSED.get(step, "nothing is known of that revision")
            raise refuse(node, f"no way from opset {before} to {step[0]}-{revision}: {why}")
        current = revision
    return [f"{name}: from opset {before} to {target}"] if changed else []


def _next_revision(op_type: str, current: int, target: int) -> int | None:
    return next((r for r in revisions(op_type) if current < r <= target), None)


@cache
def revisions(op_type: str) -> tuple[int, ...]:
    """Return the opsets in which an operator of ai.onnx was made or changed, in order."""
    return tuple(sorted(_all_revisions().get(op_type, ())))


@cache
def _all_revisions() -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, set()).add(schema.since_version)
    return found
