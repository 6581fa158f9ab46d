"""The opset that the types asked for need."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from qwrap.errors import ExportError
from qwrap.graph import raised_message
from qwrap.ort.enums import QuantType
from qwrap.ort.errors import InvalidModelError
from qwrap.ort.files.metadata import add_infer_metadata, get_opset_version
from qwrap.ort.files.model_io import STEERS_SHAPES, declare_types
from qwrap.ort.files.proto_file import weightless, with_weights

_LOGGER = logging.getLogger(__name__)
_FUSING = 11  # the opset since which quantized operators are fused
_AXIS = 13  # scales per channel
_HALF = 19  # scales of float16
_FLOAT8 = 19
_WIDE = 21  # 16 bits, 4 bits and blocks
_16_BIT = {onnx.TensorProto.UINT16, onnx.TensorProto.INT16}


def raise_opset(model: onnx.ModelProto, target: int) -> onnx.ModelProto:
    """Return a copy of ``model`` that imports ai.onnx ``target`` and computes the same.

    Models of any size; operators of other domains stay as they are. Types of the values are
    declared. ``model`` itself is returned if it imports ``target`` or later.

    Raises:
        InvalidModelError: some node has no equal there; the message names all of them.
    """
    if get_opset_version(model) >= target:
        return model
    light, weights = weightless(model, STEERS_SHAPES)
    try:
        raised = raised_message(light, target)
    except ExportError as error:
        raise InvalidModelError(str(error)) from error
    with_weights(raised, weights)
    declare_types(raised)
    add_infer_metadata(raised)
    return raised


def update_opset_version(
    model: onnx.ModelProto,
    weight_type: QuantType | int,
    activation_type: QuantType | int | None = None,
    tensor_quant_overrides: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    block_size: int = 0,
) -> onnx.ModelProto:
    """Return ``model`` with an opset in which the types can be written, itself if it has one.

    Blocks and 16-bit types need opset 21, float8 19, anything 11. Where a model cannot be raised
    for 16-bit types it stays as it is, for these can be written in domain com.microsoft too.

    Args:
        model: not modified.
        weight_type: of weights, a ``QuantType`` or an element type of ONNX.
        activation_type: of activations.
        tensor_quant_overrides: settings by tensor, whose types count too.
        block_size: of weights, 0 for none.

    Raises:
        QuantizationError: the model does not import ai.onnx exactly once.
        InvalidModelError: some node has no equal in the opset needed.
    """
    version = get_opset_version(model)
    weight = getattr(weight_type, "tensor_type", weight_type)
    activation = getattr(activation_type, "tensor_type", activation_type)
    wide = {weight, activation, *_override_types(tensor_quant_overrides)} & _16_BIT
    if version < _WIDE and block_size > 0:
        return _raise(model, version, _WIDE, "block-wise quantization natively")
    if version < _FLOAT8 and weight == onnx.TensorProto.FLOAT8E4M3FN:
        return _raise(model, version, _FLOAT8, "quantization to float 8")
    if version < _WIDE and wide:
        try:
            return _raise(model, version, _WIDE, "16-bit integer quantization natively")
        except InvalidModelError as error:
            _LOGGER.warning("opset %d stays, 16-bit types go to com.microsoft: %s", version, error)
            return model
    if version == _FUSING - 1:
        _LOGGER.warning(
            "The original model opset version is %d, which does not support node fusions. Please "
            "update the model to opset >= %d for better performance.",
            version,
            _FUSING,
        )
    if version < _FUSING - 1:
        return _raise(model, version, _FUSING, "quantization")
    return model


def raised_for_pairs(
    model: onnx.ModelProto, per_channel: bool, options: Mapping[str, Any]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return ``model`` and options with which pairs can be written for its tensors.

    Scales along an axis need opset 13, and scales of float16 need 19. Where a model cannot be
    raised that far, the pairs are those of domain com.microsoft, which take both in any opset.

    Args:
        model: not modified.
        per_channel: whether weights get a scale per channel.
        options: ``extra_options``; not modified.

    Raises:
        QuantizationError: the model does not import ai.onnx exactly once.
    """
    version, changed = get_opset_version(model), dict(options)
    overrides = (options.get("TensorQuantOverrides") or {}).values()
    along = per_channel or any("axis" in entry for entries in overrides for entry in entries)
    least = _HALF if _has_half(model.graph) else _AXIS if along else version
    if version >= least or options.get("UseQDQContribOps"):
        return model, changed
    what = "pairs of float16 tensors" if least == _HALF else "scales per channel"
    try:
        return _raise(model, version, least, what), changed
    except InvalidModelError as error:
        _LOGGER.warning("opset %d stays, pairs are of com.microsoft: %s", version, error)
        return model, {**changed, "UseQDQContribOps": True}


def _has_half(graph: onnx.GraphProto) -> bool:
    values = (*graph.input, *graph.output, *graph.value_info)
    half = onnx.TensorProto.FLOAT16
    return any(value.type.tensor_type.elem_type == half for value in values)


def _raise(model: onnx.ModelProto, version: int, target: int, what: str) -> onnx.ModelProto:
    _LOGGER.warning(
        "The original model opset version is %d, which does not support %s. Please update the "
        "model to opset >= %d. Automatically updating the model to opset %d. Please verify the "
        "quantized model.",
        version,
        what,
        target,
        target,
    )
    return raise_opset(model, target)


def _override_types(overrides: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> set[int]:
    """Return the types named in overrides, conversions included; malformed ones have none."""
    found: set[int] = set()
    for entries in (overrides or {}).values():
        for entry in entries if isinstance(entries, Sequence) else ():
            for holder in (entry, entry.get("convert") if isinstance(entry, Mapping) else None):
                kind = holder.get("quant_type") if isinstance(holder, Mapping) else None
                if isinstance(kind, QuantType):
                    found.add(kind.tensor_type)
    return found
