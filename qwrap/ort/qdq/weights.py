"""Scales and zero points of initializers: one, one for each channel, or one for each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnx import TensorProto

from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.blocked import compute_scale_zp_blocked
from qwrap.ort.numbers.code_types import Array, normalize_axis
from qwrap.ort.numbers.initializers import tensor_proto_to_array
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.numbers.weight_params import channel_params, tensor_params
from qwrap.ort.qdq.marks import QDQQuantTensorType, QDQTensorQuantInfo

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph

Entries = Sequence[Mapping[str, Any]]

_ONE_SCALE_A_CHANNEL = {
    "Conv",
    "ConvTranspose",
    "InstanceNormalization",
    "LayerNormalization",
    "BatchNormalization",
}
"""Operators whose weights have no blocks: no kernel takes them, and a depthwise one has no rows."""


def initializer_params(
    quantizer: QuantizedGraph, initializer: TensorProto, info: QDQTensorQuantInfo
) -> QuantizationParams:
    """Return type, scale, zero point, axis and block size of an initializer.

    Args:
        quantizer: whose options, types and overrides hold.
        initializer: of float32 or float16, whose type the scales have.
        info: how it was marked. Only weights have the type of weights; constants of other
            operators have that of activations.

    Raises:
        QuantizationError: the axis is none of the tensor's (a ``ValueError``).
    """
    name = initializer.name
    data = tensor_proto_to_array(initializer)
    entries: Entries = quantizer.tensor_quant_overrides.get(name) or [{}]
    given = quantizer.tensor_quant_overrides.overrides_scale_zp(name)
    is_weight = info.tensor_type is QDQQuantTensorType.WEIGHT
    quant_type = quantizer.weight_qType if is_weight else quantizer.activation_qType
    if "quant_type" in entries[0]:
        quant_type = entries[0]["quant_type"].tensor_type
    axis = entries[0].get("axis", None if given else info.axis)
    if axis is not None:
        axis = _valid_axis(name, axis, data.ndim)

    # Channels share a zero point by default, as the integer kernels want it.
    usual = quantizer.is_weight_symmetric(quant_type)
    if not is_weight:
        usual = quantizer.is_activation_symmetric
    symmetric = entries[0].get("symmetric", usual or axis is not None)
    if is_weight and not given and _is_blocked(quantizer, name, data.ndim):
        return _blocks(data, quant_type, axis, quantizer.block_size, symmetric)
    settings: dict[str, Any] = {
        "symmetric": symmetric,
        "reduce_range": quantizer.reduce_range,
        "min_real_range": quantizer.min_real_range,
    }
    if axis is None:
        zero, scale = tensor_params(data, quant_type, entries[0], **settings)
    else:
        zero, scale = channel_params(data, quant_type, axis, entries, **settings)
    return QuantizationParams(zero_point=zero, scale=scale, quant_type=quant_type, axis=axis)


def _valid_axis(name: str, axis: int, rank: int) -> int:
    valid, normalized = normalize_axis(axis, rank)
    if not valid:
        raise QuantizationError(
            f"Weight {name} has a per-channel axis with value {axis} that is out-of-bounds for "
            f"rank {rank}"
        )
    return int(normalized)


def _is_blocked(quantizer: QuantizedGraph, name: str, rank: int) -> bool:
    """Whether ``BlockSize`` holds for a weight: a matrix, or any operand of a MatMul."""
    readers = {node.op_type for node in quantizer.receivers(name)}
    if not quantizer.block_size or rank < 2 or readers & _ONE_SCALE_A_CHANNEL:
        return False
    return rank == 2 or "MatMul" in readers


def _blocks(
    data: Array, quant_type: int, axis: int | None, block_size: int, symmetric: bool
) -> QuantizationParams:
    """Return scales of blocks along the channels' axis if there is one, else along the rows."""
    axis = data.ndim - 2 if axis is None else axis
    zero, scale = compute_scale_zp_blocked(data, quant_type, axis, block_size, symmetric)
    return QuantizationParams(
        zero_point=zero, scale=scale, quant_type=quant_type, axis=axis, block_size=block_size
    )
