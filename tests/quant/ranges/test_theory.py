"""How the methods rank, and where they clip, against what theory says of known distributions."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from onnxruntime.quantization.calibrate import HistogramCollector

from qwrap.config import QuantSpec
from qwrap.dtypes import codebook_type
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant.observe.observers import HistogramObserver
from qwrap.quant.ranges import candidate_ranges
from qwrap.quant.ranges.errors import histogram_cost, least_error_range
from qwrap.quant.ranges.rows import HistogramRows
from qwrap.quant.ranges.scaling import RowScaling

DENSITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda t: np.exp(-(t**2) / 2),
    "laplace": lambda t: np.exp(-np.abs(t)),
}
ERRORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mse": np.square, "l1": np.abs}


def rows_of(name: str, bins: int = 2048) -> HistogramRows:
    """The histogram of 1e12 values of a distribution over [-16, 16)."""
    t = (np.arange(-bins * 64, bins * 64) + 0.5) / (bins * 64) * 16
    mass = DENSITIES[name](t).reshape(2 * bins, 64).sum(1)
    counts = np.append(np.round(mass / mass.sum() * 1e12), 0).astype(np.int64)
    ends = torch.tensor([-15.9]), torch.tensor([15.9])
    exponent = torch.tensor([4], dtype=torch.int32)
    return HistogramRows.of(torch.from_numpy(counts)[None], exponent, *ends)


def clip(name: str, error: str, spec: QuantSpec) -> float:
    _, high = least_error_range(rows_of(name), RowScaling(spec), error)
    return high.item()


def best_clip(name: str, error: str, spec: QuantSpec) -> tuple[float, Callable[[float], float]]:
    """The clip of least error by numerical integration, and the error of any clip."""
    t = np.linspace(-15.9, 15.9, 40_001)
    density = DENSITIES[name](t)

    def cost(end: float) -> float:
        step = 2 * end / (spec.qmax - spec.qmin)
        rounded = np.clip(np.rint(t / step), spec.dtype.qmin, spec.dtype.qmax) * step
        return float((ERRORS[error](t - rounded) * density).sum())

    ends = np.linspace(0.5, 15.9, 400)
    return ends[np.argmin([cost(end) for end in ends])], cost


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_clip_is_the_best_of_numerical_integration(name: str, error: str, bits: int) -> None:
    spec = QuantSpec(dtype=f"int{bits}", narrow_range=bits == 2)
    expected, cost = best_clip(name, error, spec)
    found = clip(name, error, spec)
    assert cost(found) <= 1.002 * cost(expected)  # the last steps of the search are 1.5 %
    assert found == pytest.approx(expected, rel=0.06)  # where the error is flat


# Banner et al., arXiv:1810.05723, appendix: clips in deviations and in scales of Laplace.
@pytest.mark.parametrize(
    ("name", "bits", "published"), [("normal", 4, 2.55), ("laplace", 3, 3.89), ("laplace", 4, 5.03)]
)
def test_the_clip_of_least_squares_is_near_the_published_one(
    name: str, bits: int, published: float
) -> None:
    found = clip(name, "mse", QuantSpec(dtype=f"int{bits}"))
    # They take errors within the range to be evenly distributed, which makes theirs a bit wider.
    assert published * 0.96 <= found <= published


@pytest.mark.parametrize("bits", [4, 8])
def test_l1_clips_more_than_mse_and_more_of_heavier_tails(bits: int) -> None:
    spec = QuantSpec(dtype=f"int{bits}")
    assert clip("laplace", "l1", spec) < 0.95 * clip("laplace", "mse", spec)
    assert clip("normal", "mse", spec) < clip("laplace", "mse", spec)


def test_every_further_bit_widens_the_range() -> None:
    for name in DENSITIES:
        clips = [clip(name, "mse", QuantSpec(dtype=f"int{bits}")) for bits in range(3, 13)]
        assert clips == sorted(clips)


def test_cosine_does_not_mind_a_common_factor() -> None:
    rows = rows_of("laplace")
    spec = QuantSpec(dtype="int4")
    cost = histogram_cost(rows, RowScaling(spec), "cosine")
    larger = HistogramRows.of(
        torch.cat([rows.counts, rows.zeros[:, None]], 1).to(torch.int64),
        torch.tensor([7], dtype=torch.int32),
        rows.low * 8,
        rows.high * 8,
    )
    scaled = histogram_cost(larger, RowScaling(spec), "cosine")
    for end in (torch.tensor([t]).double() for t in (1.0, 4.5, 15.0)):
        assert cost(-end, end).item() == pytest.approx(scaled(-8 * end, 8 * end).item(), rel=1e-9)


def test_the_cosine_of_a_single_code_is_that_of_signs() -> None:
    rows = rows_of("normal")
    spec = QuantSpec(dtype=codebook_type("ternary", [-1, 0, 1]))
    cost = histogram_cost(rows, RowScaling(spec), "cosine")
    end = torch.tensor([1e-3]).double()  # all but nothing is beyond: what is left is the sign
    # E|x| / sqrt(E x^2) of a normal variable.
    assert cost(-end, end).item() == pytest.approx(1 - math.sqrt(2 / math.pi), rel=1e-3)


def error(x: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor], spec: QuantSpec) -> float:
    qparams = choose_qparams(*ends, spec)
    fake = fake_quantize(x, qparams.scale, qparams.zero_point, spec)
    return (fake.double() - x.double()).square().mean().item()


@pytest.mark.parametrize("dtype", ["uint8", "uint4"])
def test_one_huge_value_among_uniform_ones_is_clipped_by_all_but_minmax(dtype: str) -> None:
    random = np.random.default_rng(0)
    x = np.append(random.uniform(-1, 1, 1_000_000), 40).astype(np.float32)
    observer = HistogramObserver("x")
    observer.observe(torch.from_numpy(x))
    spec = QuantSpec(dtype=dtype, symmetric=False)
    (found,) = candidate_ranges([observer], [spec], [99.99])
    errors = {m: error(torch.from_numpy(x), ends, spec) for m, ends in found.items()}
    assert found["minmax"] == (x.min(), x.max())
    for method in ("percentile", "l1", "distribution"):
        assert found[method][1] < 2.5, method
    # The least threshold has a bin for each code: 128 of 1 / 32 on each side.
    assert found["entropy"][1] == (4 if dtype == "uint8" else found["entropy"][1].clamp(max=2))
    # Rounding costs a step squared over 12, or everything where a step is wider than the values
    # lie; clipping at t (40 - t)^2 of each of 1e6 values.
    steps = 255 if dtype == "uint8" else 15
    whole = min((41 / steps) ** 2 / 12, 1 / 3)
    best = min(((1 + t) / steps) ** 2 / 12 + (40 - t) ** 2 / 1e6 for t in np.linspace(1, 40, 400))
    assert errors["minmax"] == pytest.approx(whole, rel=0.05)
    assert errors["mse"] <= 1.02 * best < errors["minmax"]
    assert errors["mse"] <= 1.001 * min(errors.values())


@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_differs_from_minmax_where_onnxruntimes_default_does_not(symmetric: bool) -> None:
    x = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
    collector = HistogramCollector("entropy", symmetric, 128, 128, 99.999, "same")
    collector.collect({"x": x})
    theirs = [float(end) for end in collector.compute_collection_result()["x"][:2]]
    assert theirs == [x.min(), x.max()]
    observer = HistogramObserver("x")
    observer.observe(torch.from_numpy(x))
    spec = QuantSpec(dtype="int8", symmetric=symmetric)
    low, high = candidate_ranges([observer], [spec], [100])[0]["entropy"]
    assert low > 0.95 * x.min()
    assert high < 0.95 * x.max()
