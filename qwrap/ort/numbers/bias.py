"""Biases as int32 codes: their scale is that of the products which they are added to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.code_types import Array

_INT32 = np.iinfo(np.int32)
_SLACK = 1.0001  # what rounding scales to float32, and their product, may take away


def bias_scale(bias: Array, input_scale: Array, weight_scale: Array) -> Array:
    """Return the scales of a bias ``[C]``: products, one or one for each of its elements.

    Args:
        bias: floats.
        input_scale: one.
        weight_scale: one, or one for each channel. Of the weight of a ConvTranspose in groups
            there are as many as outputs of one group, and they repeat.

    Raises:
        QuantizationError: the number of scales does not divide that of elements (a
            ``ValueError``).
    """
    scale = np.asarray(np.asarray(input_scale) * np.asarray(weight_scale)).reshape(-1)
    if scale.size > 1 and scale.size != bias.size:
        if bias.size % scale.size:
            raise QuantizationError(
                f"a bias of {bias.size} elements beside a weight of {scale.size} channels"
            )
        scale = np.tile(scale, bias.size // scale.size)
    stored = scale.astype(bias.dtype)
    # a scale of 0 is none; float16 has few digits below its smallest normal number
    return np.asarray(np.maximum(stored, np.finfo(bias.dtype).tiny))


def bias_codes(bias: Array, scale: Array, factor: float = 1.0) -> tuple[NDArray[np.int32], bool]:
    """Return the codes of ``factor * bias``, zero point 0, and whether any was out of range.

    Args:
        bias: floats ``[C]``.
        scale: one, or one for each element.
        factor: such as Gemm's beta, which the node then no longer has.

    Raises:
        QuantizationError: the bias is not finite (a ``ValueError``).
    """
    # float64: float32 cannot hold all codes
    steps = np.round(np.asarray(bias, np.float64) * factor / np.asarray(scale, np.float64))
    if not np.isfinite(steps).all():
        raise QuantizationError("a bias holds NaN or infinity and cannot be quantized")
    outside = bool(((steps < _INT32.min) | (steps > _INT32.max)).any())
    return steps.clip(_INT32.min, _INT32.max).astype(np.int32), outside


def weight_scale_for_bias(bias: Array, input_scale: Array, weight_scale: Array) -> Array | None:
    """Return larger scales of a weight, with which the codes of the bias fit int32.

    Zero points of the weight may stay as they are, whatever they are: with a larger scale its
    codes only move towards them.

    Args:
        bias: floats ``[C]``, multiplied already by what the node multiplies them by.
        input_scale: one.
        weight_scale: one, or one for each channel; see ``bias_scale``.

    Returns:
        An array like ``weight_scale``, or None if the bias fits as it is.

    Source: tensorflow/lite/tools/optimize/quantization_utils.cc, by way of onnxruntime's
    ``qdq_quantizer.py``.
    """
    scales = np.asarray(weight_scale)
    if not scales.size or not bias.size:
        return None
    flat = scales.reshape(-1).astype(np.float64)
    largest = np.abs(np.asarray(bias, np.float64)).reshape(-1)
    if bias.size % flat.size:
        raise QuantizationError(
            f"a bias of {bias.size} elements beside a weight of {flat.size} channels"
        )
    largest = largest.reshape(-1, flat.size).max(0) if flat.size > 1 else largest.max(keepdims=True)
    least = _SLACK * 2.0 * largest / (float(_INT32.max) - float(_INT32.min + 1))
    product = flat * float(np.asarray(input_scale).item())
    small = (product < least) & (product > 0)
    if not small.any():
        return None
    enlarged = flat.copy()
    enlarged[small] *= least[small] / product[small]
    stored = enlarged.astype(scales.dtype)
    if stored.dtype == np.float16:  # whose rounding the slack does not cover
        stored = np.where(stored < enlarged, np.nextafter(stored, np.float16(np.inf)), stored)
    return np.asarray(stored.reshape(scales.shape))
