"""Fake quantization to levels and odd integers: values by brute force, gradients by formula."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import FLOAT4E2M1, QuantType, codebook_type, quant_type
from qwrap.numerics import QParams, dequantize, fake_quantize, quantize

LOG2 = codebook_type("log2", [0, *(2.0**-k for k in range(7)), *(-(2.0**-k) for k in range(7))])
LOPSIDED = codebook_type("lopsided", [-1, -0.25, 0, 0.4, 3])
INT3, UINT3 = quant_type("int3"), quant_type("uint3")
HALVES = [torch.float16, torch.bfloat16]

floats = st.floats(width=32, min_value=-8, max_value=8)
shaped = arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=5), elements=floats)


def by_brute_force(x: Tensor, scale: float, levels: tuple[float, ...]) -> Tensor:
    steps = (x / scale).double()
    distances = (steps[..., None] - torch.tensor(levels, dtype=torch.float64)).abs()
    best = distances == distances.amin(-1, keepdim=True)
    index = best.int().argmax(-1)  # the first of equals: the lower level
    return torch.tensor(levels)[index] * scale


def with_gradient(x: Tensor, scale: Tensor, spec: QuantSpec, zero_point: int = 0) -> Tensor:
    x = x.detach().requires_grad_()
    fake_quantize(x, scale, torch.full_like(scale, zero_point, dtype=torch.int32), spec).backward(
        torch.full_like(x, 3.0)
    )
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", [LOG2, LOPSIDED])
@given(x=shaped, scale=st.sampled_from([0.037, 0.5, 1.0, 3.3]))
def test_a_code_book_takes_the_nearest_level(dtype: QuantType, x: np.ndarray, scale: float) -> None:
    values, spec = torch.from_numpy(x), QuantSpec(dtype=dtype)
    assert dtype.levels is not None
    scales, zeros = torch.tensor([scale]), torch.zeros(1, dtype=torch.int32)
    expected = by_brute_force(values, float(scales), dtype.levels)
    assert torch.equal(fake_quantize(values, scales, zeros, spec), expected)
    codes = quantize(values, QParams(scales, zeros), spec)
    assert codes.dtype == torch.uint8
    assert torch.equal(dequantize(codes, QParams(scales, zeros), dtype), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_code_book_has_a_scale_for_each_channel_or_block(axis: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(x.shape[axis], generator=torch.Generator().manual_seed(1)) + 0.1
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    found = fake_quantize(x, scale, zeros, QuantSpec(dtype=LOG2, axis=axis))
    for i, row in enumerate(x.unbind(axis)):
        expected = by_brute_force(row, float(scale[i]), LOG2.levels or ())
        assert torch.equal(found.select(axis, i), expected)
    blocks = torch.rand(4, 2, generator=torch.Generator().manual_seed(2)) + 0.1
    spec = QuantSpec(dtype=LOG2, axis=1, block_size=4)
    found = fake_quantize(x, blocks, torch.zeros_like(blocks, dtype=torch.int32), spec)
    for i in range(4):
        for j in range(2):
            part = slice(4 * j, 4 * j + 4)
            expected = by_brute_force(x[i, part], float(blocks[i, j]), LOG2.levels or ())
            assert torch.equal(found[i, part], expected)


@pytest.mark.parametrize("dtype", [LOG2, LOPSIDED, FLOAT4E2M1])
def test_the_gradient_passes_from_the_first_level_to_the_last_both_included(
    dtype: QuantType,
) -> None:
    ends = torch.tensor([dtype.qmin, dtype.qmax])
    outside = torch.nextafter(ends, torch.tensor([-torch.inf, torch.inf]))
    x = torch.cat([ends, outside, torch.tensor([0.0, 0.3])]) * 0.5
    gradient = with_gradient(x, torch.tensor([0.5]), QuantSpec(dtype=dtype))
    assert gradient.tolist() == [3, 3, 0, 0, 3, 3]


def test_the_gradient_of_an_odd_integer_passes_where_no_code_was_clamped() -> None:
    x = torch.tensor([-4.5, -4.6, 3.49, 3.6, 0.2]) * 0.25  # -4.5 rounds to the even code -4
    gradient = with_gradient(x, torch.tensor([0.25]), QuantSpec(dtype=INT3))
    assert gradient.tolist() == [3, 0, 3, 0, 3]
    x = torch.tensor([-2.0, -3.0, 5.0, 6.0]) * 0.25
    spec = QuantSpec(dtype=UINT3, symmetric=False)
    assert with_gradient(x, torch.tensor([0.25]), spec, 2).tolist() == [3, 0, 3, 0]


@pytest.mark.parametrize("dtype", [LOG2, INT3])
def test_what_is_infinite_becomes_the_end_and_nan_stays(dtype: QuantType) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], requires_grad=True)
    args = torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32), QuantSpec(dtype=dtype)
    for found in (fake_quantize(x, *args), fake_quantize(x.detach(), *args)):
        assert found[:2].tolist() == [0.5 * dtype.qmax, 0.5 * dtype.qmin]
        assert found[2].isnan()


@pytest.mark.parametrize("dtype", [LOG2, INT3])
@pytest.mark.parametrize("half", HALVES)
def test_half_precision_is_rounded_in_float32(dtype: QuantType, half: torch.dtype) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(half)
    args = torch.tensor([0.173]), torch.zeros(1, dtype=torch.int32), QuantSpec(dtype=dtype)
    found = fake_quantize(x.clone().requires_grad_(), *args)
    assert found.dtype == half
    assert torch.equal(found, fake_quantize(x.float(), *args).to(half))
    assert with_gradient(x, args[0], args[2]).dtype == half


@pytest.mark.parametrize("dtype", [LOG2, INT3])
def test_values_do_not_depend_on_whether_gradients_are_wanted(dtype: QuantType) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 2
    args = torch.tensor([0.3]), torch.zeros(1, dtype=torch.int32), QuantSpec(dtype=dtype)
    assert torch.equal(fake_quantize(x.clone().requires_grad_(), *args), fake_quantize(x, *args))


@pytest.mark.parametrize("dtype", [LOG2, INT3, FLOAT4E2M1])
def test_it_compiles_in_one_graph_with_dynamic_shapes(dtype: QuantType) -> None:
    spec = QuantSpec(dtype=dtype)
    scale, zeros = torch.tensor([0.3]), torch.zeros(1, dtype=torch.int32)

    def simulate(x: Tensor) -> Tensor:
        return fake_quantize(x * 2, scale, zeros, spec)

    compiled = torch.compile(simulate, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (7, 12):
        x = torch.randn(size, generator=torch.Generator().manual_seed(size))
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
            found = compiled(theirs)
        expected = simulate(ours)
        assert torch.equal(found, expected)
        found.sum().backward()
        expected.sum().backward()
        assert torch.equal(theirs.grad, ours.grad)
        with torch.no_grad():
            assert torch.equal(compiled(x), simulate(x))
