"""Codes of arrays in groups, one group a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwrap.nbits.blocks import BlockFormat
from qwrap.nbits.gptq import gptq as compensated
from qwrap.nbits.kquant import k_quant
from qwrap.nbits.split import dequantize
from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]


def quant_tensor(
    data: Array,
    num_bits: int = 4,
    group_size: int = 32,
    scheme: str = "asym",
    dtype: str = "int",
    ratio: float = 1.0,
) -> tuple[Array, Array, Array]:
    """Return codes ``[groups, group_size]``, scales and zero points ``[groups, 1]``.

    Args:
        data: of a multiple of ``group_size`` numbers.
        num_bits: of a code.
        group_size: numbers that share a scale.
        scheme: "sym" or "asym".
        dtype: "uint": codes from 0 on, and a zero point among them; "int": signed where they are
            symmetric, and a zero point of any size.
        ratio: share of the range that codes span.
    """
    groups, top = np.reshape(data, (-1, group_size)), 2**num_bits - 1
    low = groups.min(axis=1, keepdims=True) * ratio
    high = groups.max(axis=1, keepdims=True) * ratio
    lowest = 0
    if scheme == "sym":
        lowest = 0 if dtype == "uint" else -(2 ** (num_bits - 1))
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    elif dtype == "uint":  # else the zero point would not be a code
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    width = high.astype(np.float64) - low.astype(np.float64)
    scale = np.where(width == 0, 1.0, width / top)
    if scheme == "sym":
        middle = 2 ** (num_bits - 1) if dtype == "uint" else 0
        zero_point = np.full(scale.shape, middle, np.uint8 if dtype == "uint" else np.float64)
    else:
        zero_point = (-low.astype(np.float64) / scale).round()
        if dtype == "uint":
            zero_point = zero_point.clip(0, top).astype(np.uint8)
    codes = (groups / scale + zero_point).round().clip(lowest, lowest + top)
    return codes, scale, zero_point


def qdq_tensor(
    data: Array,
    num_bits: int = 4,
    group_size: int = 32,
    scheme: str = "asym",
    dtype: str = "int",
    ratio: float = 1.0,
) -> Array:
    """Return what ``quant_tensor``'s codes stand for, in the shape of ``data``."""
    codes, scale, zero_point = quant_tensor(data, num_bits, group_size, scheme, dtype, ratio)
    return np.reshape(scale * (codes - zero_point), data.shape)


def quant_tensor_k_quant_cpu(
    data: Array, num_bits: int = 4, group_size: int = 32
) -> tuple[Array, Array, Array]:
    """Return codes ``[groups, group_size]``, scales, zero points ``[groups, 1]``, by a search."""
    groups = torch.from_numpy(np.reshape(data, (-1, group_size)).astype(np.float32))
    blocks = k_quant(groups, BlockFormat(num_bits, group_size))
    assert blocks.zero_point is not None
    codes = blocks.codes.numpy().astype(np.float64)
    return codes, blocks.scale.numpy().astype(np.float64), blocks.zero_point.numpy()


def quant_tensor_k_quant_cuda(
    data: Array, num_bits: int = 4, group_size: int = 32
) -> tuple[Array, Array, Array]:
    """Return the same as ``quant_tensor_k_quant_cpu``, which has no need of a GPU."""
    return quant_tensor_k_quant_cpu(data, num_bits, group_size)


def pad_tensor(weight: Array, group_size: int, k_blocks: int) -> Array:
    """Return a weight ``[K, N]`` with rows of zeros up to ``k_blocks`` groups; -1: as it is."""
    if group_size == -1:
        return weight
    return np.pad(weight, ((0, max(0, k_blocks * group_size - len(weight))), (0, 0)))


def get_weight_scale(weight: Array, group_size: int) -> Array:
    """Return for each column the mean size of its values relative to the largest of their group."""
    groups = weight if group_size == -1 else np.reshape(weight, (-1, group_size))
    sizes = np.abs(groups)
    relative = sizes / sizes.max(axis=1, keepdims=True)
    mean: Array = np.reshape(relative, weight.shape).mean(axis=0)
    return mean


class _Given:
    """Statistics that are known already."""

    def __init__(self, second: Array) -> None:
        self.second = torch.from_numpy(np.array(second, np.float64))


def gptq(
    W: Array,
    H: Array,
    num_bits: int = 4,
    group_size: int = 32,
    scheme: str = "asym",
    blocksize: int = 128,
    percdamp: float = 0.01,
    actorder: bool = False,
    mse: bool = False,
    perchannel: bool = True,
) -> Array:
    """Return a weight ``[K, N]`` on its grid, so that errors cancel on the inputs.

    Args:
        W: ``[K, N]``; not modified.
        H: sum or mean of products of inputs ``[K, K]``; not modified.
        num_bits: of a code.
        group_size: inputs that share a scale; -1: all.
        scheme: "sym" or "asym".
        blocksize: inputs whose errors are spread at once.
        percdamp: what is added to the power of each input, relative to the mean.
        actorder: begin with the inputs of most power.
        mse: search the range.
        perchannel: a scale for each output.

    Raises:
        QuantizationError: another scheme (a ``ValueError``).
    """
    form = BlockFormat(num_bits, max(group_size, 0), is_symmetric(scheme))
    blocks = compensated(
        torch.from_numpy(np.array(W, np.float32)).T,
        form,
        _Given(H),  # type: ignore[arg-type]  # all that is asked of statistics
        damping=percdamp,
        act_order=actorder,
        search=mse,
        per_channel=perchannel,
        block=blocksize,
    )
    return dequantize(blocks).T.numpy().astype(W.dtype)


def is_symmetric(scheme: str) -> bool:
    """Return whether a scheme is symmetric.

    Raises:
        QuantizationError: it is none (a ``ValueError``).
    """
    if scheme not in ("sym", "asym"):
        raise QuantizationError(f"scheme '{scheme}' is not 'sym' or 'asym'")
    return scheme == "sym"
