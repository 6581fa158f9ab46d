"""Weights inside functions of the model: the functions that hold some give way to their bodies."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import onnx_ir as ir

from qwrap.errors import ModelError, QwrapWarning
from qwrap.graph.constants import Constants
from qwrap.graph.expand import FUNCTION, expand_functions
from qwrap.graph.index import walk_nodes
from qwrap.graph.nodes import STANDARD
from qwrap.nbits.matrices import WEIGHT_INPUT


def expand_weighted(model: ir.Model, op_types: Collection[str]) -> ir.Model:
    """Return the model, or a copy in which calls of functions with weights are their bodies.

    What a function multiplies with may come from each call; in the body it can be told, and
    becomes codes. A constant inside is one initialiser for all calls. Where functions cannot be
    expanded they stay, and a ``QwrapWarning`` says why.

    Args:
        model: not modified.
        op_types: operators whose weights are to be quantized.
    """
    holding = {
        identifier
        for identifier, function in model.functions.items()
        if _holds(function, model, op_types, frozenset({identifier}))
    }
    if not holding:
        return model
    try:
        copy = expand_functions(
            model, lambda _: False, lambda call: call.op_identifier() not in holding
        )
    except ModelError as error:
        warnings.warn(f"weights in functions stay float: {error}", QwrapWarning, stacklevel=3)
        return model
    if copy is not model:
        _share_constants(copy, op_types)
    return copy


def _holds(
    function: ir.Function,
    model: ir.Model,
    op_types: Collection[str],
    callers: frozenset[ir.OperatorIdentifier],
) -> bool:
    for node in walk_nodes(function.graph):
        identifier = node.op_identifier()
        inner = model.functions.get(identifier)
        if inner is not None and identifier not in callers:
            if _holds(inner, model, op_types, callers | {identifier}):
                return True
        elif _is_weighted(node, op_types):
            return True
    return False


def _is_weighted(node: ir.Node, op_types: Collection[str]) -> bool:
    if node.op_type not in op_types or node.domain not in STANDARD:
        return False
    return _may_be_constant(node.inputs[WEIGHT_INPUT[node.op_type]])


def _may_be_constant(value: ir.Value | None) -> bool:
    """Whether a value of a function is a constant, or one of its inputs, moved at most."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Identity", "Transpose"):
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return value is not None and (producer is None or producer.op_type == "Constant")


def _share_constants(model: ir.Model, op_types: Collection[str]) -> None:
    """Let what several calls made of one constant be one initialiser, in place."""
    constants, found = Constants(model), dict[int, list[ir.Value]]()
    for node in walk_nodes(model.graph):
        if FUNCTION not in node.metadata_props or not _is_weighted(node, op_types):
            continue
        value = node.inputs[WEIGHT_INPUT[node.op_type]]
        while value is not None and (maker := value.producer()) is not None:
            if maker.op_type == "Constant":
                tensor = constants.tensor(value)
                if tensor is not None:
                    found.setdefault(id(tensor), []).append(value)
                break
            value = maker.inputs[0]
    for values in found.values():
        if len(dict.fromkeys(values)) > 1:
            _merge(model, constants, list(dict.fromkeys(values)))


def _merge(model: ir.Model, constants: Constants, values: list[ir.Value]) -> None:
    tensor = constants.tensor(values[0])
    assert tensor is not None
    name = constants.unique_name(f"{values[0].name}_shared")
    shared = constants.add_tensor(model.graph, ir.tensor(tensor, name=name))
    for value in values:
        value.replace_all_uses_with(shared)
    constants.drop_unused(values)
