"""Errors on a histogram against the errors of a fine sample of its density, rounded for real."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantFunction, codebook_type
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant.ranges.errors import histogram_cost
from qwrap.quant.ranges.rounding import CellRounding, EdgeRounding
from qwrap.quant.ranges.rows import HistogramRows
from qwrap.quant.ranges.scaling import RowScaling

LOG2 = codebook_type("log2", [0, *(s * 2.0**-k for k in range(5) for s in (1, -1))])
UNEVEN = codebook_type("uneven", [-0.3, -0.1, 0.0, 0.2, 1.0])
SPECS = [
    QuantSpec(dtype="uint8", symmetric=False),
    QuantSpec(dtype="int8"),
    QuantSpec(dtype="int8", narrow_range=True),
    QuantSpec(dtype="uint8", symmetric=False, reduce_range=True),
    QuantSpec(dtype="uint8", symmetric=False, restricted=True),
    QuantSpec(dtype="uint8", symmetric=False, power_of_two=True),
    QuantSpec(dtype="int2"),
    QuantSpec(dtype="uint5", symmetric=False),
    QuantSpec(dtype="int12"),
    QuantSpec(dtype="uint16", symmetric=False),
    QuantSpec(dtype="float8e4m3fn"),
    QuantSpec(dtype="float8e5m2fnuz"),
    QuantSpec(dtype="float4e2m1", scale_type="float8e8m0"),
    QuantSpec(dtype="int4", scale_type="float16"),
    QuantSpec(dtype=LOG2),
    QuantSpec(dtype=UNEVEN),
]
LOW, HIGH = -1.2, 0.9  # where the ranges tried end; the values go from -2 to 2


def rows_of(counts: Tensor, low: float, high: float) -> HistogramRows:
    """Histograms over [-2, 2) with the given extremes."""
    ends = torch.tensor([low]).expand(len(counts)), torch.tensor([high]).expand(len(counts))
    return HistogramRows.of(counts, torch.ones(len(counts), dtype=torch.int32), *ends)


def random_rows() -> HistogramRows:
    counts = torch.randint(0, 50, (3, 65), generator=torch.Generator().manual_seed(0))
    counts[:, 32] += counts[:, -1]
    return rows_of(counts, -1.99, 1.97)


def sample(rows: HistogramRows, per_bin: int = 4000) -> tuple[Tensor, Tensor]:
    """Values evenly spread within each bin, and their weights, ``[R, N * per_bin]`` each."""
    inside = (torch.arange(per_bin, dtype=torch.float64) + 0.5) / per_bin
    left, right = rows.edges[:, :-1, None], rows.edges[:, 1:, None]
    weights = (rows.counts / per_bin)[:, :, None].expand(-1, -1, per_bin)
    return (left + (right - left) * inside).flatten(1), weights.flatten(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("error", ["mse", "l1", "cosine"])
def test_the_error_of_a_histogram_is_that_of_its_density(spec: QuantSpec, error: str) -> None:
    rows = random_rows()
    low, high = torch.full((3,), LOW).double(), torch.full((3,), HIGH).double()
    ours = histogram_cost(rows, RowScaling(spec), error)(low, high)
    values, weights = sample(rows)
    qparams = choose_qparams(low[:1], high[:1], spec)
    grid = spec.as_computed()
    fake = fake_quantize(values.float(), qparams.scale, qparams.zero_point, grid).double()
    expected = {
        "mse": (weights * (values - fake) ** 2).sum(1),
        "l1": (weights * (values - fake).abs()).sum(1),
        "cosine": 1
        - (weights * values * fake).sum(1)
        / ((weights * values**2).sum(1) * (weights * fake**2).sum(1)).sqrt(),
    }[error]
    # Some 4000 points a bin put the borders between numbers a point's width off; where steps are
    # as narrow as that, as those of 16 bits, float32 values near them are rounded either way.
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-10)


@pytest.mark.parametrize("error", ["squares", "magnitudes", "moments"])
@pytest.mark.parametrize("spec", [s for s in SPECS if s.dtype.is_integer][:8], ids=str)
def test_cell_by_cell_and_edge_by_edge_agree(spec: QuantSpec, error: str) -> None:
    rows, grid = random_rows(), spec.as_computed()
    low, high = torch.tensor([-1.2, 0.0, -2.0]), torch.tensor([0.9, 1.7, 0.0])
    qparams = choose_qparams(low, high, spec)
    cells = getattr(CellRounding(rows, grid), error)(qparams)
    edges = getattr(EdgeRounding(rows, grid), error)(qparams)
    # Sums of terms of the size of the values' power, of which float64 keeps 1e-16.
    scale = rows.counts.sum(1).max().item() * 4
    torch.testing.assert_close(cells, edges, rtol=1e-9, atol=1e-13 * scale)


@pytest.mark.parametrize("error", ["mse", "l1", "cosine"])
def test_a_function_has_the_error_of_the_type_it_computes(error: str) -> None:
    spec = QuantSpec(dtype="int4", narrow_range=True)

    def compute(x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).round().clamp(-7, 7) * scale

    function = QuantFunction(b"", compute, has_zero_point=False, own_gradient=False)
    dtype = replace(spec.dtype, name="mine", function=function, qmin=-7, qmax=7)
    rows = random_rows()
    ends = torch.full((3,), LOW).double(), torch.full((3,), -LOW).double()
    ours = histogram_cost(rows, RowScaling(QuantSpec(dtype=dtype)), error)(*ends)
    # As computed, int4 has a code more below.
    seven = codebook_type("seven", range(-7, 8))
    expected = histogram_cost(rows, RowScaling(QuantSpec(dtype=seven)), error)(*ends)
    torch.testing.assert_close(ours, expected, rtol=0.04, atol=0)  # four points a bin, 32 bins


def test_exact_zeros_have_no_error() -> None:
    counts = torch.zeros(2, 65, dtype=torch.int64)
    counts[:, 40], counts[1, 32], counts[1, -1] = 10, 500, 500
    rows = rows_of(counts, 0.0, 0.52)
    cost = histogram_cost(rows, RowScaling(QuantSpec(dtype="int2")), "mse")
    alone, with_zeros = cost(torch.zeros(2).double(), torch.full((2,), 0.4).double())
    assert alone == with_zeros > 0


def test_nothing_lies_beyond_the_extremes() -> None:
    rows = random_rows()
    assert (rows.edges[:, 0] == torch.tensor(-1.99)).all()
    assert (rows.edges[:, -1] == torch.tensor(1.97)).all()
    whole = histogram_cost(rows, RowScaling(QuantSpec(dtype="uint16", symmetric=False)), "mse")
    step = (1.99 + 1.97) / 65535
    error = whole(rows.low, rows.high) / rows.counts.sum(1)
    # Rounding alone: the mean of squares over a step.
    torch.testing.assert_close(error, torch.full((3,), step**2 / 12).double(), rtol=1e-3, atol=0)


def test_a_lone_value_at_the_edge_of_its_bin_is_not_lost() -> None:
    counts = torch.zeros(1, 65, dtype=torch.int64)
    counts[0, 48] = 7
    rows = rows_of(counts, 1.0, 1.0)
    assert (rows.density * rows.edges.diff(dim=1)).sum() == 7
    clipped = histogram_cost(rows, RowScaling(QuantSpec(dtype="int8", narrow_range=True)), "mse")
    cost = clipped(torch.zeros(1).double(), torch.full((1,), 0.5).double())
    # 127 steps of 0.5 / 127 end at 0.504 for the clamped code -128 … 127; the value is spread
    # over a 64th of a bin of 1/16.
    assert cost.item() == pytest.approx(7 * 0.5**2, rel=3e-3)


def test_extremes_that_the_sample_missed_count_once() -> None:
    counts = torch.zeros(1, 65, dtype=torch.int64)
    counts[0, 33] = 100
    rows = rows_of(counts, -1.5, 1.5)
    assert rows.counts.sum() == 102
    assert rows.counts[0, [8, 56]].tolist() == [1, 1]
