"""Scales and zero points of activations, from their ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qwrap.ort.calibrate import TensorData
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.quant_utils import (
    compute_scale_zp,
    compute_scale_zp_float8,
    get_qmin_qmax_for_qType,
    snap_zero_point_to_uint8,
)

if TYPE_CHECKING:
    from qwrap.ort.qoperator.code_graph import CodeGraph


def activation_params(quantizer: CodeGraph) -> dict[str, Any] | None:
    """Return the parameters of each tensor with a range; None without ranges.

    Scales are float32, whatever the tensors are: that is what the kernels take.

    Raises:
        TypeError: a range is no ``TensorData``.
    """
    if quantizer.tensors_range is None:
        return None
    quantizer.adjust_tensor_ranges()
    params = {}
    for name in quantizer.tensors_range:
        data = quantizer.tensors_range[name]
        if not isinstance(data, TensorData):
            raise TypeError(f"Unexpected type {type(data)} for {name!r}.")
        params[name] = _params(quantizer, name, data)
    return params


def _params(quantizer: CodeGraph, name: str, data: TensorData) -> QuantizationParams:
    overrides = quantizer.tensor_quant_overrides.get_per_tensor_overrides(name, {}) or {}
    kind = quantizer.activation_qType
    if "quant_type" in overrides:
        kind = overrides["quant_type"].tensor_type
    if "scale" in overrides and "zero_point" in overrides:
        zero_point, scale = np.asarray(overrides["zero_point"]), overrides["scale"]
    elif kind == TensorProto.FLOAT8E4M3FN:
        zero_point, scale = compute_scale_zp_float8(kind, data.avg_std[1])
    else:
        zero_point, scale = _from_range(quantizer, kind, data, overrides)
    return QuantizationParams(
        zero_point=np.asarray(zero_point),
        scale=np.asarray(scale, np.float32),
        quant_type=kind,
    )


def _from_range(
    quantizer: CodeGraph, kind: int, data: TensorData, overrides: dict[str, Any]
) -> Any:
    """Return zero point and scale that cover a range."""
    low, high = data.range_value
    low = np.asarray(overrides.get("rmin", low), np.float32)
    high = np.asarray(overrides.get("rmax", high), np.float32)
    symmetric = overrides.get("symmetric", quantizer.is_activation_symmetric)
    reduced = overrides.get("reduce_range", False)
    qmin, qmax = get_qmin_qmax_for_qType(kind, reduce_range=reduced, symmetric=symmetric)
    if (
        quantizer.is_activation_restricted_asymmetric
        and kind == TensorProto.UINT8
        and not symmetric
    ):
        ends = int(qmin), int(qmax)
        return snap_zero_point_to_uint8(low, high, *ends, min_real_range=quantizer.min_real_range)
    return compute_scale_zp(low, high, qmin, qmax, symmetric, quantizer.min_real_range)


def param_tensors(
    quantizer: CodeGraph, name: str, scale: float | None, zero_point: int | None
) -> tuple[TensorProto, TensorProto] | None:
    """Return initializers of the scale and the zero point of a tensor; None if it has no range.

    Args:
        quantizer: knows the parameters.
        name: of the tensor.
        scale: instead of the calibrated one, together with ``zero_point``.
        zero_point: instead of the calibrated one.
    """
    params = (quantizer.quantization_params or {}).get(name)
    if params is None:
        return None
    kind = params["quant_type"]
    if scale is None or zero_point is None:
        scale, zero_point = params["scale"], params["zero_point"]
    scale_name = quantizer.free_name(f"{name}_scale")
    zero_point_name = quantizer.free_name(f"{name}_zero_point")
    zeros = np.asarray(zero_point).ravel().tolist()
    return (
        numpy_helper.from_array(np.float32(scale).reshape(()), scale_name),
        helper.make_tensor(zero_point_name, kind, [], zeros),
    )
