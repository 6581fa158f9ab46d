"""Scales and zero points of activations, from calibrated ranges and what the user overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from qwrap.ort.calibrate import TensorData
from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.code_types import (
    FLOAT8_TYPES,
    ONNX_INT_TYPE_RANGE,
    ONNX_TYPE_TO_NP_TYPE,
    Array,
    get_qmin_qmax_for_qType,
)
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.numbers.scales import (
    compute_scale_zp,
    compute_scale_zp_float8,
    snap_zero_point_to_uint8,
)
from qwrap.ort.qdq.marks import QDQTensorQuantParams

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph

Overrides = Mapping[str, Any]


def activation_params(
    quantizer: QuantizedGraph, data: TensorData, overrides: Overrides, dtype: Any = None
) -> QuantizationParams:
    """Return type, scale and zero point of an activation; the arrays are 0-d.

    Args:
        quantizer: whose options and default type hold.
        data: calibrated statistics.
        overrides: what the user says of the tensor; it goes before ``data``.
        dtype: numpy's name of the tensor's floats, None for that of ``data``.
    """
    quant_type: int = quantizer.activation_qType
    if "quant_type" in overrides:
        quant_type = overrides["quant_type"].tensor_type
    if "scale" in overrides and "zero_point" in overrides:
        zero = np.asarray(overrides["zero_point"]).astype(ONNX_TYPE_TO_NP_TYPE[quant_type])
        scale = np.asarray(overrides["scale"], dtype or _float_type(overrides["scale"]))
    elif quant_type in FLOAT8_TYPES:
        zero, scale = compute_scale_zp_float8(quant_type, np.asarray(data.avg_std[1]))
    else:
        zero, scale = _integer_params(quantizer, data, overrides, quant_type)
    return QuantizationParams(
        zero_point=zero.reshape(()), scale=_as_type(scale.reshape(()), dtype), quant_type=quant_type
    )


def _integer_params(
    quantizer: QuantizedGraph, data: TensorData, overrides: Overrides, quant_type: int
) -> list[Array]:
    low = _end(overrides.get("rmin"), data, 0)
    high = _end(overrides.get("rmax"), data, 1)
    if low > high:  # of a tensor without elements
        low, high = np.zeros_like(low), np.zeros_like(high)
    symmetric = overrides.get("symmetric", quantizer.is_activation_symmetric)
    reduce_range = overrides.get("reduce_range", False)
    qmin, qmax = get_qmin_qmax_for_qType(quant_type, reduce_range, symmetric)
    least = quantizer.min_real_range
    snapped = quantizer.is_activation_restricted_asymmetric and not symmetric
    if snapped and quant_type == TensorProto.UINT8:
        return list(snap_zero_point_to_uint8(low, high, int(qmin), int(qmax), least))
    return compute_scale_zp(low, high, qmin, qmax, symmetric, least)


def _end(override: Any, data: TensorData, side: int) -> Array:
    """Return one end of a range, 0-d; of ranges per channel the outermost."""
    if override is not None:
        return np.asarray(override, _float_type(override)).reshape(())
    ends = np.asarray(data.range_value[side])
    return ends.reshape(()) if ends.size == 1 else np.asarray((ends.min, ends.max)[side]())


def _float_type(value: Any) -> Any:
    """Return the type of a number, float32 for one that scales cannot have."""
    known = getattr(value, "dtype", None)
    return known if known in (np.float16, np.float32) else np.float32


def _as_type(scale: Array, dtype: Any) -> Array:
    """Return ``scale`` in another type; what is too small for it becomes its smallest normal."""
    if dtype is None or scale.dtype == dtype:
        return scale
    return np.asarray(np.maximum(scale, np.finfo(dtype).tiny), dtype)


def graph_params(quantizer: QuantizedGraph, names: list[str]) -> dict[str, QDQTensorQuantParams]:
    """Return the parameters of activations, converted ones included, by tensor name.

    A range that no scale can be made of, such as an infinite one, is noted in ``refused``.

    Args:
        quantizer: whose calibrated ranges, options and overrides hold.
        names: of tensors, all of which have a range.

    Raises:
        TypeError: a range is no ``TensorData``.
    """
    found = {}
    for name in names:
        data = quantizer.tensors_range[name]
        if not isinstance(data, TensorData):
            raise TypeError(f"Unexpected type {type(data)} for {name!r}.")
        overrides = quantizer.tensor_quant_overrides.get_per_tensor_overrides(name, {}) or {}
        try:
            found[name] = _tensor_params(quantizer, name, data, overrides)
        except QuantizationError as error:
            quantizer.refused[name] = str(error)
    return found


def _tensor_params(
    quantizer: QuantizedGraph, name: str, data: TensorData, overrides: Overrides
) -> QDQTensorQuantParams:
    dtype = quantizer.numpy_type(name)
    original = activation_params(quantizer, data, overrides, dtype)
    if "convert" not in overrides:
        return QDQTensorQuantParams(original, None, None)
    converted = activation_params(quantizer, data, overrides["convert"], dtype)
    return QDQTensorQuantParams(original, converted, overrides["convert"].get("recv_nodes"))


def has_own_params(overrides: Overrides, provided: int) -> bool:
    """Whether overrides give a tensor parameters that another one's cannot stand for.

    Args:
        overrides: of the tensor.
        provided: type of the other one's codes.
    """
    kind = overrides.get("quant_type")
    if kind is not None and kind.tensor_type != provided:
        return True
    return any(
        key in overrides
        for key in ("scale", "zero_point", "rmin", "rmax", "symmetric", "reduce_range")
    )


def saturates(params: QuantizationParams, low: float, high: float) -> bool:
    """Whether no code lies beyond those of ``low`` and ``high``: quantizing then clips to them.

    Args:
        params: per tensor.
        low: smallest value that is let through; may be infinite.
        high: largest one.
    """
    if params["quant_type"] in FLOAT8_TYPES:
        return False
    qmin, qmax = ONNX_INT_TYPE_RANGE[params["quant_type"]]
    zero, scale = float(params["zero_point"]), float(params["scale"])
    return bool(
        np.round(low / scale) + zero <= float(qmin) and np.round(high / scale) + zero >= float(qmax)
    )
