"""The closed-form integrals of rounding errors against fine sums over the rounding itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.numerics import QParams, choose_qparams, fake_quantize
from qwrap.quant.ranges.integrals import (
    absolute_error_integral,
    error_moment_integral,
    squared_error_integral,
)

Integral = Callable[[Tensor, Tensor, Tensor, QuantSpec], Tensor]
INTEGRANDS: dict[Integral, Callable[[Tensor, Tensor], Tensor]] = {
    squared_error_integral: lambda t, fake: (t - fake) ** 2,
    absolute_error_integral: lambda t, fake: (t - fake).abs(),
    error_moment_integral: lambda t, fake: t * (t - fake),
}
SPECS = [
    QuantSpec(dtype="uint8", symmetric=False),
    QuantSpec(dtype="int4"),
    QuantSpec(dtype="uint2", symmetric=False),
    QuantSpec(dtype="int3", narrow_range=True),
]


def qparams_of(spec: QuantSpec) -> QParams:
    return choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), spec)


@pytest.mark.parametrize("integral", INTEGRANDS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("end", [0.3, 1.7, 4.0, -0.4, -4.0])  # the range ends at -1 and 2
def test_an_integral_is_that_of_a_fine_sum(integral: Integral, spec: QuantSpec, end: float) -> None:
    qparams = qparams_of(spec)
    width = end / 100_000
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) * width
    fake = fake_quantize(t.to(torch.float32), qparams.scale, qparams.zero_point, spec).double()
    expected = (INTEGRANDS[integral](t, fake) * width).sum().item()
    ours = integral(
        torch.tensor([end], dtype=torch.float64), qparams.scale, qparams.zero_point, spec
    )
    # Where the sum straddles a middle between codes, t * error jumps by t steps; of some 150 such
    # jumps most cancel.
    slack = 10 * abs(end * width) * qparams.scale.item()
    assert ours.item() == pytest.approx(expected, rel=1e-5, abs=slack)


def test_a_whole_cell_has_a_twelfth_of_a_step_cubed() -> None:
    half = torch.tensor([0.5, -0.5, 7.5], dtype=torch.float64)
    spec, one, zero = QuantSpec(dtype="int8"), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    squares = squared_error_integral(half, one, zero, spec)
    torch.testing.assert_close(squares * 12, torch.tensor([0.5, -0.5, 7.5]).double())
    magnitudes = absolute_error_integral(half, one, zero, spec)
    torch.testing.assert_close(magnitudes * 4, torch.tensor([0.5, -0.5, 7.5]).double())
