"""Random numbers, and dropout.

Without a ``seed`` they come from torch's generator, so that ``torch.manual_seed`` steers them. With
one they are those of ``numpy.random.RandomState(seed)``, which ONNX's reference implementation
uses: the same ones at each call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.element_types import torch_dtype
from qwrap.ops.registry import op


@torch.library.custom_op("qwrap::seeded_random", mutates_args=())
def seeded_random(shape: Sequence[int], seed: int, normal: bool) -> Tensor:
    """Return float64 numbers of ``RandomState(seed)``, uniform in [0, 1) or normal.

    An operator of its own, because compilers cannot see through numpy's generator.
    """
    state = np.random.RandomState(seed)
    draw = state.standard_normal if normal else state.random_sample
    return torch.from_numpy(np.asarray(draw(tuple(shape))))


@seeded_random.register_fake
def _(shape: Sequence[int], seed: int, normal: bool) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float64)


def _draw(
    shape: Sequence[int],
    seed: float | None,
    dtype: torch.dtype,
    device: torch.device | None,
    *,
    normal: bool = False,
) -> Tensor:
    """Return numbers uniform in [0, 1), or of a standard normal distribution."""
    if seed is None:
        draw = torch.randn if normal else torch.rand
        return draw(tuple(shape), dtype=dtype, device=device)
    numbers: Tensor = seeded_random(list(shape), int(seed) % 2**32, normal)
    return numbers.to(device=device, dtype=dtype)


@op("RandomUniform", since=(1, 22))
def random_uniform(
    *,
    shape: Sequence[int],
    dtype: int = 1,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return numbers uniform in ``[low, high)``."""
    return _draw(shape, seed, torch_dtype(dtype), device) * (high - low) + low


@op("RandomUniformLike", since=(1, 22))
def random_uniform_like(
    input: Tensor,
    *,
    dtype: int | None = None,
    high: float = 1.0,
    low: float = 0.0,
    seed: float | None = None,
) -> Tensor:
    """Return numbers uniform in ``[low, high)``, as many as in ``input``."""
    kind = input.dtype if dtype is None else torch_dtype(dtype)
    return _draw(input.shape, seed, kind, input.device) * (high - low) + low


@op("RandomNormal", since=(1, 22))
def random_normal(
    *,
    shape: Sequence[int],
    dtype: int = 1,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return normally distributed numbers with standard deviation ``scale``."""
    return _draw(shape, seed, torch_dtype(dtype), device, normal=True) * scale + mean


@op("RandomNormalLike", since=(1, 22))
def random_normal_like(
    input: Tensor,
    *,
    dtype: int | None = None,
    mean: float = 0.0,
    scale: float = 1.0,
    seed: float | None = None,
) -> Tensor:
    """Return normally distributed numbers, as many as in ``input``."""
    kind = input.dtype if dtype is None else torch_dtype(dtype)
    return _draw(input.shape, seed, kind, input.device, normal=True) * scale + mean


@op("Bernoulli", since=(15, 22))
def bernoulli(input: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """Return one with probability ``input``, else zero.

    The function body in the schema swaps the two, against its own text and ONNX's reference.
    """
    kind = torch.float64 if seed is not None else torch.float32  # half would round to 1.0
    ones = _draw(input.shape, seed, kind, input.device) < input
    return ones.to(input.dtype if dtype is None else torch_dtype(dtype))


@op("Multinomial", since=(7, 22))
def multinomial(
    input: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None
) -> Tensor:
    """Draw ``sample_size`` classes for each row of logits, with replacement."""
    limits = torch.softmax(input.double(), -1).cumsum(-1)
    shape = (input.shape[0], sample_size)
    draws = _draw(shape, seed, torch.float64, input.device) * limits[:, -1:]
    return torch.searchsorted(limits, draws, right=True).to(torch_dtype(dtype))


def _check_test(*, is_test: int = 0, ratio: float = 0.5) -> None:
    del ratio
    if not is_test:
        raise UnsupportedOpError("is_test=0 drops at random; set is_test=1, or import opset 12")


@op("Dropout", since=(1, 6), ignored=("ratio", "is_test"), check=_check_test)
@op("Dropout", since=(7,), ignored=("ratio",))
def dropout_without_mask_type(data: Tensor, *, output_count: int = 1) -> tuple[Tensor, ...]:
    """Return ``data``; these revisions drop nothing in inference. The mask has its type."""
    return (data, torch.ones_like(data))[:output_count]


@op("Dropout", since=(10,), ignored=("ratio",))
def dropout_without_training(data: Tensor, *, output_count: int = 1) -> tuple[Tensor, ...]:
    """Return ``data``; the mask is left open in inference, and onnxruntime fills it with false."""
    return (data, torch.zeros_like(data, dtype=torch.bool))[:output_count]


@op("Dropout", since=(12, 13, 22), host=(1, 2))
def dropout(
    data: Tensor,
    ratio: float | None = None,
    training_mode: bool | None = None,
    *,
    seed: int | None = None,
    output_count: int = 1,
) -> tuple[Tensor, ...]:
    """Zero a random share ``ratio`` of ``data`` and scale the rest, if training."""
    ratio = 0.5 if ratio is None else ratio
    if not training_mode or ratio == 0:
        return (data, torch.ones_like(data, dtype=torch.bool))[:output_count]
    if seed is None and output_count == 1:
        return (F.dropout(data, ratio),)
    kind = torch.float32 if seed is None else torch.float64
    mask = _draw(data.shape, seed, kind, data.device) >= ratio
    return (data * mask * (1 / (1 - ratio)), mask)[:output_count]
