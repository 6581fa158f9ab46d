"""Learned fake-quantization against a plain float64 loop over the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwrap.config import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.learned import Grid, Known, Sums, learned_fake_quantize
from qwrap.numerics import choose_qparams, fake_quantize, scale_shape, spread

KINDS = ["uint8", "int8", "int4", "uint4", "int16", "float8e4m3fn", "float4e2m1"]
LAYOUTS = [(None, None), (0, None), (1, None), (-1, None), (1, 3), (0, 2)]


def case(kind, axis, block, symmetric, seed, shape=(4, 5, 7)):
    dtype = quant_type(kind)
    spec = QuantSpec(
        dtype=dtype, symmetric=symmetric or not dtype.has_zero_point, axis=axis, block_size=block
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    scales = scale_shape(shape, spec)
    ends = torch.rand(scales, generator=generator) + 0.3  # so that some values are clamped
    qparams = choose_qparams(-ends, 1.5 * ends, spec)
    upstream = torch.randn(shape, generator=generator)
    return x, spec, qparams, upstream


def expected_sums(x, spec, qparams, upstream, shape):
    """Add up in float64 what one element tells of its scale, by the definition."""
    rounded = fake_quantize(x, qparams.scale, qparams.zero_point, spec)
    scale = spread(qparams.scale, x.shape, spec).expand(x.shape)
    zero = spread(qparams.zero_point, x.shape, spec).expand(x.shape)
    owner = spread(torch.arange(qparams.scale.numel()).reshape(shape), x.shape, spec)
    owner = owner.expand(x.shape)
    sums = np.zeros((3, qparams.scale.numel()))
    passed = np.zeros(x.numel())
    for i in range(x.numel()):
        t = float(x.reshape(-1)[i] / scale.reshape(-1)[i])
        value = float(rounded.reshape(-1)[i] / scale.reshape(-1)[i])
        g, who = float(upstream.reshape(-1)[i]), int(owner.reshape(-1)[i])
        z = int(zero.reshape(-1)[i])
        whole = spec.dtype.levels is None
        code = round(t) + z if whole else t
        if code < spec.qmin:
            sums[1, who] += g
        elif code > spec.qmax:
            sums[2, who] += g
        else:
            passed[i] = g
            sums[0, who] += g * (value - t)
    return sums.reshape(3, *shape), passed.reshape(x.shape)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    symmetric=st.booleans(),
    is_alive=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_value_gradient_and_sums_are_those_of_the_definition(
    kind, layout, symmetric, is_alive, seed
) -> None:
    x, spec, qparams, upstream = case(kind, *layout, symmetric, seed)
    found: list[Sums] = []

    def rule(sums):
        found.append(sums)
        return (sums.inside,)

    parameter = torch.zeros_like(qparams.scale, requires_grad=True)
    grid = Grid(qparams.scale, qparams.zero_point, spec, is_alive=is_alive)
    wanted = x.clone().requires_grad_()
    result = learned_fake_quantize(wanted, grid, [parameter], rule)
    assert torch.equal(result, fake_quantize(x, qparams.scale, qparams.zero_point, spec))
    result.backward(upstream)
    sums, passed = expected_sums(x, spec, qparams, upstream, qparams.scale.shape)
    np.testing.assert_array_equal(wanted.grad.numpy(), passed.astype(np.float32))
    # Without x each residual is stored to the nearest 1/252; with it there is float32 rounding of
    # t, which counts for types of many codes.
    kept = not is_alive and spec.dtype.levels is None
    each = (1 / 504 if kept else 0) + 2.0**-23 * max(abs(spec.qmin), spec.qmax)
    slack = each * float(upstream.abs().sum()) + 1e-5
    for name, wanted_sum in zip(("inside", "below", "above"), sums, strict=True):
        np.testing.assert_allclose(
            getattr(found[0], name).numpy(), wanted_sum, rtol=0, atol=slack, err_msg=name
        )
    assert torch.equal(parameter.grad, found[0].inside)
    per_scale = x.numel() // qparams.scale.numel()
    assert found[0].count == (per_scale if is_alive else max(per_scale // len(x), 1))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_the_order_of_the_axes_in_memory_stays_and_does_not_matter(order) -> None:
    spec = QuantSpec(dtype="uint8", symmetric=False)
    qparams = choose_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), spec)
    plain = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    inverse = [order.index(i) for i in range(4)]
    x = plain.permute(order).contiguous().permute(inverse).requires_grad_()
    parameter = torch.zeros(1, requires_grad=True)
    grid = Grid(qparams.scale, qparams.zero_point, spec)
    result = learned_fake_quantize(x, grid, [parameter], lambda sums: (sums.inside + sums.above,))
    assert result.stride() == x.stride()
    assert torch.equal(
        result.contiguous(), fake_quantize(plain, qparams.scale, qparams.zero_point, spec)
    )
    upstream = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    result.backward(upstream)
    first = parameter.grad.clone(), x.grad.clone()
    parameter.grad = None
    other = plain.clone().requires_grad_()
    learned_fake_quantize(
        other, grid, [parameter], lambda sums: (sums.inside + sums.above,)
    ).backward(upstream)
    assert torch.equal(first[1], other.grad)
    torch.testing.assert_close(first[0], parameter.grad)  # another order of summation


def test_a_slice_with_gaps_is_quantized_as_it_is() -> None:
    spec = QuantSpec(dtype="int8")
    qparams = choose_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), spec)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))[::2, 1::3].requires_grad_()
    grid = Grid(qparams.scale, qparams.zero_point, spec)
    result = learned_fake_quantize(x, grid, [], None)
    assert torch.equal(result, fake_quantize(x, qparams.scale, qparams.zero_point, spec))


def test_without_a_rule_parameters_get_zeros_and_a_known_value_is_taken() -> None:
    spec = QuantSpec(dtype="int8")
    qparams = choose_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), spec)
    x, parameter = torch.randn(5, requires_grad=True), torch.ones(1, requires_grad=True)
    grid = Grid(qparams.scale, qparams.zero_point, spec, is_alive=True)
    known = Known(torch.full((5,), 7.0))
    result = learned_fake_quantize(x, grid, [parameter], None, known)
    assert torch.equal(result, known.value)
    result.sum().backward()
    assert (parameter.grad.tolist(), known.passes) == ([0.0], 1)


@pytest.mark.parametrize("axis", [None, 1])
def test_a_result_can_be_changed_in_place(axis) -> None:
    """As by an activation function with inplace=True behind the model."""
    x, spec, qparams, _ = case("uint8", axis, None, False, 0)
    x.requires_grad_()
    grid = Grid(qparams.scale, qparams.zero_point, spec)
    learned_fake_quantize(x, grid).add_(1).sum().backward()
    assert set(x.grad.flatten().tolist()) == {0.0, 1.0}
