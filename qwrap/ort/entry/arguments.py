"""Checks of what the user asks for, before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto
from onnxruntime.capi import onnxruntime_pybind11_state

from qwrap.ort.enums import CalibrationMethod, QuantFormat, QuantType
from qwrap.ort.errors import QuantizationError, UnknownNameError
from qwrap.ort.registry import IntegerOpsRegistry, QDQRegistry, QLinearOpsRegistry

logger = logging.getLogger(__name__)

_WIDE = (QuantType.QInt16, QuantType.QUInt16)
_NARROW = (QuantType.QInt4, QuantType.QUInt4)
_FLOAT8 = QuantType.QFLOAT8E4M3FN


def check_static_quant_arguments(
    quant_format: QuantFormat, activation_type: QuantType, weight_type: QuantType
) -> None:
    """Refuse types that do not go together, or not in that form.

    Raises:
        QuantizationError: such as int8 activations with uint8 weights (a ``ValueError``).
    """
    for name, value, kind in (
        ("quant_format", quant_format, QuantFormat),
        ("activation_type", activation_type, QuantType),
        ("weight_type", weight_type, QuantType),
    ):
        if not isinstance(value, kind):
            raise QuantizationError(f"{name} must be a {kind.__name__}, not {value!r}")
    types = f"activation_type=QuantType.{activation_type}, weight_type=QuantType.{weight_type}"
    if (activation_type, weight_type) == (QuantType.QInt8, QuantType.QUInt8):
        raise QuantizationError(
            f"ONNXRuntime quantization doesn't support data format:{types}; "
            "take QInt8 weights, or QUInt8 activations"
        )
    if (activation_type == _FLOAT8) != (weight_type == _FLOAT8):
        raise QuantizationError(
            f"ONNXRuntime quantization doesn't support data format: {types}; "
            "float 8 has to be the type of both"
        )
    if quant_format is QuantFormat.QDQ:
        return
    if activation_type in _WIDE or weight_type in _WIDE:
        raise QuantizationError("Only QuantFormat.QDQ supports 16-bit quantization types.")
    if activation_type in _NARROW or weight_type in _NARROW:
        raise QuantizationError("Only QuantFormat.QDQ supports 4-bit quantization types.")
    if activation_type == QuantType.QInt8:
        logger.warning(
            "Please use QuantFormat.QDQ for activation type QInt8 and weight type QInt8. "
            "Or it will lead to bad performance on x64."
        )


def check_dynamic_quant_arguments(weight_type: QuantType) -> None:
    """Refuse types of weights that no operator with scales of its run time takes.

    Raises:
        QuantizationError: the type is not of 8 bits, or is float 8.
    """
    if weight_type not in (QuantType.QInt8, QuantType.QUInt8):
        raise QuantizationError(
            f"quantize_dynamic takes weight_type QInt8 or QUInt8, not {weight_type!s}: the integer "
            "operators have no other; for smaller weights use MatMulNBitsQuantizer"
        )


def check_method(method: CalibrationMethod, activation_type: QuantType) -> None:
    """Refuse a method that is none, and float 8 with any but Distribution.

    Raises:
        QuantizationError: as said (a ``ValueError``).
    """
    if not isinstance(method, CalibrationMethod):
        raise QuantizationError(f"calibrate_method must be a CalibrationMethod, not {method!r}")
    if activation_type == _FLOAT8 and method is not CalibrationMethod.Distribution:
        raise QuantizationError(
            "Only Distribution calibration method is supported for float quantization."
        )


def check_names(
    model: ModelProto,
    nodes_to_quantize: Collection[str] | None,
    nodes_to_exclude: Collection[str] | None,
    op_types: Collection[str] | None,
    lifted: Collection[str] = (),
) -> None:
    """Refuse names of nodes that no node has, and operator types that do not exist.

    ``lifted`` are names of Constant nodes that became initializers, see ``read_model``.

    Raises:
        UnknownNameError: with the nearest name.
        QuantizationError: a node is both to be quantized and to be excluded.
    """
    nodes = list(every_node(model.graph))
    names = {node.name for node in nodes} | set(lifted)
    _check_list("op_types_to_quantize", op_types)
    for what, asked in (
        ("nodes_to_quantize", nodes_to_quantize),
        ("nodes_to_exclude", nodes_to_exclude),
    ):
        _check_list(what, asked)
        for name in asked or ():
            if name not in names:
                raise UnknownNameError(f"node of {what}", name, names)
    both = sorted(set(nodes_to_quantize or ()) & set(nodes_to_exclude or ()))
    if both:
        raise QuantizationError(
            f"node '{both[0]}' is in nodes_to_quantize and in nodes_to_exclude; "
            "take it out of one of them"
        )
    known = {node.op_type for node in nodes} | _known_types()
    for op_type in op_types or ():
        if op_type not in known:
            raise UnknownNameError("operator type of op_types_to_quantize", op_type, known)


def _check_list(what: str, names: Any) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise QuantizationError(f"{what} must be a list of names, not {names!r}")


def _known_types() -> set[str]:
    registered = {*QDQRegistry, *QLinearOpsRegistry, *IntegerOpsRegistry}
    schemas = (*onnx.defs.get_all_schemas(), *onnxruntime_pybind11_state.get_all_operator_schema())
    return registered | {schema.name for schema in schemas}


def check_receivers(model: ModelProto, overrides: Mapping[str, Sequence[Any]]) -> None:
    """Refuse names in ``recv_nodes`` that no reader of the tensor has.

    Raises:
        UnknownNameError: with the nearest name.
    """
    readers: dict[str, set[str]] = {}
    for node in every_node(model.graph):
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    for tensor, entries in overrides.items():
        for entry in entries:
            convert = entry.get("convert") or {}
            for name in convert.get("recv_nodes") or ():
                if name not in readers.get(tensor, ()):
                    what = f"node of recv_nodes, reader of '{tensor}',"
                    raise UnknownNameError(what, name, readers.get(tensor, ()))


def every_node(graph: GraphProto) -> Iterator[NodeProto]:
    """Return the nodes of a graph and of all bodies within, a body after its node."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from every_node(body)


def bodies(node: NodeProto) -> Iterable[GraphProto]:
    """Return the graphs that a node holds in its attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs
