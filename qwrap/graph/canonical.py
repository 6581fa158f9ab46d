"""One form for what exporters write in many, so that onnxruntime's integer kernels fit."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.graph.constants import Constants, fold_constant_weights, integers, label
from qwrap.graph.fold import FoldedNorms, fold_batch_norm, fold_scale_and_shift
from qwrap.graph.index import ValueType, infer_types, opset_of, walk_nodes

ROI_OPTIONAL = 13
MAXIMUM_BROADCASTS = 8
POOLED_RANKS = (4, 5)  # in three dimensions a mean over the last may as well be a LayerNorm's


def canonicalize(model: ir.Model, folded: FoldedNorms | None = None) -> list[str]:
    """Rewrite ``model`` in place into the form that quantizes best; it computes the same.

    Constants on their way to a weight are evaluated; BatchNormalization and scales and shifts
    by channel go into the layer before; a mean over the spatial axes becomes a
    GlobalAveragePool. Nodes and values that remain keep their names, in subgraphs too; functions
    of the model are left alone. What is not named in the result is unchanged.

    Args:
        model: what to edit.
        folded: takes what layers were before they absorbed a BatchNormalization.

    Returns:
        A line for each node that was folded or replaced.
    """
    lines = fold_constant_weights(model)
    while found := fold_batch_norm(model, folded) + fold_scale_and_shift(model, folded):
        lines += found
    return lines + mean_to_global_pool(model) + drop_empty_roi(model) + prelu_to_maximum(model)


def drop_empty_roi(model: ir.Model) -> list[str]:
    """Leave out, in place, the region input of each Resize that has none to give.

    Up to opset 12 the input is mandatory, and exporters pass an empty tensor. Where onnxruntime
    moves a Transpose across the Resize it picks entries of that tensor, and fails when run.

    Returns:
        A line for each Resize that was changed.
    """
    if opset_of(model, "") < ROI_OPTIONAL:
        return []
    constants, lines = Constants(model), []
    for node in walk_nodes(model.graph):
        roi = node.inputs[1] if node.op_type == "Resize" and len(node.inputs) > 1 else None
        array = None if roi is None else constants.array(roi)
        if array is not None and array.size == 0:
            node.replace_input_with(1, None)
            lines.append(f"{label(node)}: empty region input left out")
    return lines


def prelu_to_maximum(model: ir.Model) -> list[str]:
    """Replace, in place, each PRelu with slopes of at most 1 by the larger of x and slope * x.

    It is the same value. onnxruntime's PRelu takes a branch for every element, some fifteen times
    as long as the two operators together.

    Returns:
        A line for each PRelu that is gone.
    """
    if opset_of(model, "") < MAXIMUM_BROADCASTS:
        return []
    constants, lines = Constants(model), []
    for node in [n for n in walk_nodes(model.graph) if n.op_type == "PRelu" and not n.domain]:
        x, slope = node.inputs
        slopes = constants.floats(slope)
        if slopes is None or not (slopes <= 1).all():
            continue
        assert isinstance(node.graph, ir.Graph)
        scaled = ir.node("Mul", [x, slope], name=f"{node.name}_scaled" if node.name else None)
        scaled.outputs[0].name = constants.unique_name(f"{node.outputs[0].name}_scaled")
        scaled.outputs[0].type = node.outputs[0].type
        node.graph.insert_before(node, scaled)
        lines.append(f"{label(node)}: replaced by Mul and Max")
        node.op_type = "Max"
        node.replace_input_with(1, scaled.outputs[0])
    return lines


def mean_to_global_pool(model: ir.Model) -> list[str]:
    """Replace, in place, each ReduceMean over exactly the spatial axes by a GlobalAveragePool.

    Without ``keepdims`` a Flatten follows, named ``<node>_flatten``. A mean that is subtracted
    from what it was taken of belongs to a normalisation and stays.

    Returns:
        A line for each ReduceMean that is gone.
    """
    nodes = [n for n in walk_nodes(model.graph) if n.op_type == "ReduceMean" and not n.domain]
    if not nodes:
        return []
    constants, types, lines = Constants(model), infer_types(model), []
    for node in nodes:
        source = node.inputs[0]
        assert source is not None
        known = types.get(source, ValueType())
        if _is_spatial_mean(constants, node, known) and not _normalises(node, source):
            lines.append(f"{label(node)}: replaced by GlobalAveragePool")
            _become_pool(constants, node)
    return lines


def _is_spatial_mean(constants: Constants, node: ir.Node, known: ValueType) -> bool:
    axes, rank = integers(constants, node, "axes", 1), known.rank
    if axes is None or rank not in POOLED_RANKS:
        return False
    if known.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return False
    return sorted(axis % rank for axis in axes) == list(range(2, rank))


def _normalises(node: ir.Node, source: ir.Value) -> bool:
    producer = source.producer()
    if producer is not None and producer.op_type == "Pow":  # a mean square
        return True
    readers = [use.node for use in node.outputs[0].uses()]
    return any(reader.op_type == "Sub" and source in reader.inputs for reader in readers)


def _become_pool(constants: Constants, node: ir.Node) -> None:
    """Turn a ReduceMean over the spatial axes into GlobalAveragePool (and Flatten), in place."""
    keepdims = node.attributes.get("keepdims")
    axes = tuple(node.inputs[1:])
    node.resize_inputs(1)
    node.attributes.clear()
    node.op_type = "GlobalAveragePool"
    constants.drop_unused(axes)
    if keepdims is not None and keepdims.as_int() == 0:
        _flatten_after(constants, node)


def _flatten_after(constants: Constants, node: ir.Node) -> None:
    # The node at hand becomes the Flatten, so that its output stays what it was to its readers.
    pool = ir.node(
        "GlobalAveragePool",
        inputs=[node.inputs[0]],
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    pool.outputs[0].name = constants.unique_name(f"{node.outputs[0].name}_pooled")
    pool.outputs[0].type = node.outputs[0].type
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, pool)
    node.op_type = "Flatten"
    node.attributes.add(ir.AttrInt64("axis", 1))
    node.replace_input_with(0, pool.outputs[0])
    node.name = f"{node.name}_flatten" if node.name else node.name
