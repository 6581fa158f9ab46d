"""Codes of what a node reads: constants once, activations behind a node that quantizes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qwrap.ort.enums import QuantizedValueType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.graphs.tensor_types import FLOATS
from qwrap.ort.quant_utils import TENSOR_NAME_QUANT_SUFFIX, QuantizedValue

if TYPE_CHECKING:
    from qwrap.ort.qoperator.code_graph import CodeGraph
    from qwrap.ort.qoperator.code_values import CodeValues

Quantized = tuple[list[QuantizedValue], list[NodeProto]]

BYTES = (TensorProto.INT8, TensorProto.UINT8)


class Weight(NamedTuple):
    """How constants are quantized that are weights.

    Attributes:
        reduce_range: in 7 bits, where the quantizer is asked for them.
        per_channel: with a scale per channel, where it is asked for them.
        axis: along which channels run.
    """

    reduce_range: bool = False
    per_channel: bool = False
    axis: int = -1


def quantize(
    quantizer: CodeValues,
    node: NodeProto,
    indices: Sequence[int],
    weight: Weight | None = None,
    nested: bool = False,
) -> Quantized | None:
    """Return the codes of inputs of a node, and the nodes that make them.

    Args:
        quantizer: of the graph that has the node, or of one around it.
        node: the float node.
        indices: of its inputs.
        weight: how constants are quantized; None for the type of activations.
        nested: the node is of a body in this graph, to which the new nodes are appended.

    Returns:
        None where a scale is missing.

    Raises:
        QuantizationError: an input is of no graph (a ``ValueError``).
    """
    values: list[QuantizedValue] = []
    nodes: list[NodeProto] = []
    for index in indices:
        name = node.input[index]
        if not name:
            values.append(QuantizedValue("", "", "", "", QuantizedValueType.Input))
            continue
        made = _one(quantizer, node, index, weight)
        if made is None:
            return None
        values.append(made[0])
        nodes += made[1]
    if nested:
        quantizer.add_new_nodes(nodes)
        return values, []
    return values, nodes


def _one(
    quantizer: CodeValues, node: NodeProto, index: int, weight: Weight | None
) -> tuple[QuantizedValue, list[NodeProto]] | None:
    name = node.input[index]
    if quantizer.model.get_initializer(name) is not None:
        return _constant(quantizer, name, weight), []
    known = quantizer.quantized_value_map.get(name)
    if known is not None:
        return known, []
    if quantizer.contains_tensor(name):
        kind = quantizer.types.declared(name) or TensorProto.FLOAT
        made = quantizer._get_quantize_input_nodes(
            node, index, quantizer.activation_qType, initial_type=kind
        )
        return None if made is None else (quantizer.quantized_value_map[name], made)
    if quantizer.parent is None:
        raise QuantizationError(
            f"Invalid tensor name to quantize: {name} @graph scope {quantizer.graph_scope}"
        )
    found = quantize(quantizer.parent, node, [index], weight, nested=True)
    return None if found is None else (found[0][0], [])


def _constant(quantizer: CodeValues, name: str, weight: Weight | None) -> QuantizedValue:
    overrides = quantizer.tensor_quant_overrides
    if weight is None:
        return constant(quantizer, name, quantizer.activation_qType)
    asked = weight.per_channel and quantizer.per_channel
    tensor = quantizer.model.get_initializer(name)
    ranked = tensor is not None and len(tensor.dims) > 1
    if overrides.has_per_tensor_overrides(name):
        asked = False
    elif overrides.has_per_channel_overrides(name):
        asked = weight.per_channel
    return constant(
        quantizer,
        name,
        quantizer.weight_qType,
        weight.reduce_range,
        axis=weight.axis if asked and ranked else None,
        either_sign=quantizer.activation_qType == TensorProto.UINT8,
    )


def constant(
    quantizer: CodeValues,
    name: str,
    kind: int,
    reduce_range: bool = False,
    keep_float: bool = False,
    axis: int | None = None,
    either_sign: bool = False,
) -> QuantizedValue:
    """Return the codes of a constant, made once for all nodes that can share them.

    Nodes that cannot, because they need another type or one scale instead of many, get codes of
    their own, named after a copy ``<name>_<number>``.

    Args:
        quantizer: of the graph that has the constant.
        name: of the float initializer.
        kind: ``TensorProto.DataType`` of the codes; an override goes first.
        reduce_range: 7 bits where the quantizer is asked for them.
        keep_float: add only scale and zero point.
        axis: along which channels run, None for one scale.
        either_sign: codes of the other sign, made for another node, will do.
    """
    tensor = quantizer.model.get_initializer(name)
    if tensor is None:
        raise QuantizationError(f"{name} is not an initializer")
    kind = overridden_type(quantizer, name, kind)
    if axis is not None:
        axis %= max(len(tensor.dims), 1)
    made = quantizer.constant_codes.setdefault(name, [])
    last = quantizer.quantized_value_map.get(name)
    for value in [*([] if last is None else [last]), *made]:
        stored = value_type(quantizer, value)
        fits = stored == kind or (either_sign and stored in BYTES)
        if fits and value.axis in (None, axis):
            quantizer.quantized_value_map[name] = value
            return value
    source = name if last is None and not _clashes(quantizer, name) else _copied(quantizer, tensor)
    codes, zero_point, scale = _codes(quantizer, source, kind, reduce_range, keep_float, axis)
    quantizer.take(codes, zero_point, scale)
    value = QuantizedValue(
        name, codes, scale, zero_point, QuantizedValueType.Initializer, axis, node_qtype=kind
    )
    made.append(value)
    quantizer.quantized_value_map[name] = value
    return value


def _clashes(quantizer: CodeValues, name: str) -> bool:
    """Whether the model has a tensor of the names that codes of a constant would get."""
    suffixes = TENSOR_NAME_QUANT_SUFFIX, "_scale", "_zero_point"
    return any(quantizer.is_taken(name + suffix) for suffix in suffixes)


def _codes(
    quantizer: CodeValues,
    name: str,
    kind: int,
    reduce_range: bool,
    keep_float: bool,
    axis: int | None,
) -> tuple[str, str, str]:
    """Add codes, zero point and scale of a constant; the scale is float32, as kernels take it."""
    tensor = quantizer.model.get_initializer(name)
    if axis is None and tensor is not None:
        names = quantizer.quantize_initializer_impl(tensor, kind, reduce_range, keep_float)
    else:
        names = quantizer.quantize_weight_per_channel_impl(
            name, kind, axis or 0, reduce_range, keep_float
        )
    codes, zero_point, scale = names
    widen(quantizer, scale)
    return codes, zero_point, scale


def widen(quantizer: CodeGraph, name: str) -> None:
    """Make a float16 initializer float32, in place."""
    tensor = quantizer.model.get_initializer(name)
    if tensor is not None and tensor.data_type == TensorProto.FLOAT16:
        tensor.CopyFrom(float32_tensor(tensor))


def _copied(quantizer: CodeValues, tensor: TensorProto) -> str:
    """Return the name of a copy of a constant, which is cleaned away once it is quantized."""
    count, name = 1, f"{tensor.name}_1"
    while quantizer.is_taken(name) or _clashes(quantizer, name):
        count += 1
        name = f"{tensor.name}_{count}"
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    quantizer.take(name)
    quantizer.model.add_initializer(copy)
    return name


def overridden_type(quantizer: CodeGraph, name: str, kind: int) -> int:
    """Return the type that an override gives a tensor, else ``kind``."""
    overrides = quantizer.tensor_quant_overrides.get(name) or [{}]
    chosen = overrides[0].get("quant_type")
    return kind if chosen is None else int(chosen.tensor_type)


def code_type(quantizer: CodeGraph, name: str, as_weight: bool = False) -> int | None:
    """Return the type that a tensor's codes have or would get; None if it cannot have any."""
    constant = quantizer.model.get_initializer(name)
    if constant is not None:
        default = quantizer.weight_qType if as_weight else quantizer.activation_qType
        fits = constant.data_type in FLOATS
        return overridden_type(quantizer, name, default) if fits else None
    known = quantizer.quantized_value_map.get(name)
    if known is not None:
        return value_type(quantizer, known)
    if not quantizer.contains_tensor(name):
        parent = quantizer.parent
        return None if parent is None else code_type(parent, name, as_weight)
    if (quantizer.types.declared(name) or TensorProto.FLOAT) not in FLOATS:
        return None
    if not quantizer.static and name not in (quantizer.quantization_params or {}):
        return int(quantizer.activation_qType)
    return quantizer.output_type(name)


def value_type(quantizer: CodeGraph, value: QuantizedValue) -> int:
    """Return the type of codes."""
    if value.node_qtype in BYTES:
        return int(value.node_qtype)
    zero_point = quantizer.find_initializer(value.zp_name)
    return int(quantizer.activation_qType if zero_point is None else zero_point.data_type)


def quantize_nodes(
    quantizer: CodeValues,
    name: str,
    kind: int,
    given: tuple[str, str] | None,
    initial_type: int | None,
) -> list[NodeProto] | None:
    """Return nodes that make codes of an activation, the last of them those.

    Args:
        quantizer: of the graph that has the activation.
        name: float tensor.
        kind: ``TensorProto.DataType`` of codes whose range is measured.
        given: scale and zero point to use; None for the tensor's own.
        initial_type: type of the tensor, None if nothing says it.

    Returns:
        None where a scale is missing.
    """
    if given is None:
        found, *names = quantizer._get_quantization_params(name)[:3]
        given = (names[0], names[1]) if found else None
    if given is None and quantizer.static:
        return None
    made: list[NodeProto] = []
    source = name
    if initial_type == TensorProto.FLOAT16:
        source = quantizer.free_name(f"{name}_float32")
        made.append(cast_node(name, source, TensorProto.FLOAT))
    codes = quantizer.free_name(name + TENSOR_NAME_QUANT_SUFFIX)
    if given is None and quantizer.fuse_dynamic_quant and kind == TensorProto.UINT8:
        given = quantizer.free_name(f"{name}_scale"), quantizer.free_name(f"{name}_zero_point")
        made.append(
            helper.make_node(
                "DynamicQuantizeLinear", [source], [codes, *given], f"{name}_QuantizeLinear"
            )
        )
    else:
        if given is None:
            given = quantizer._get_dynamic_input_quantization_params(
                source, made, kind, TensorProto.FLOAT
            )[:2]
        inputs = [source, *given]
        made.append(helper.make_node("QuantizeLinear", inputs, [codes], f"{name}_QuantizeLinear"))
    zero_point = quantizer.find_initializer(given[1])
    stored = kind if zero_point is None else int(zero_point.data_type)
    quantizer.note_value(name, codes, *given, stored)
    return made


def cast_node(source: str, made: str, data_type: int) -> NodeProto:
    """Return a Cast node that is named after its output."""
    return helper.make_node("Cast", [source], [made], f"{made}_Cast", to=data_type)


def float32_tensor(tensor: TensorProto) -> TensorProto:
    """Return an initializer as float32, under its name."""
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
