"""Ranges of observed tensors: every method, alone and many at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from qwrap.config import METHODS, QuantSpec
from qwrap.dtypes import INT8, INT16, UINT8, codebook_type
from qwrap.errors import ConfigError
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant.observe.observers import HistogramObserver, MinMaxObserver, Observer
from qwrap.quant.ranges import candidate_ranges, choose_ranges

ACTIVATION = QuantSpec(dtype=UINT8, symmetric=False)
SPECS = [
    ACTIVATION,
    QuantSpec(dtype=INT8),
    QuantSpec(dtype="uint4", symmetric=False),
    QuantSpec(dtype="uint16", symmetric=False),
    QuantSpec(dtype="uint8", symmetric=False, restricted=True),
    QuantSpec(dtype="int8", power_of_two=True),
    QuantSpec(dtype="float8e4m3fn"),
    QuantSpec(dtype="float4e2m1", scale_type="float8e8m0"),
    QuantSpec(dtype="int8", scale_type="float8e4m3fn"),
    QuantSpec(dtype=codebook_type("thirds", [-1, -1 / 3, 0, 1 / 3, 1])),
]
magnitudes = st.floats(2.0**-60, 2.0**40, width=32)
numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v))
values = arrays(np.float32, array_shapes(max_dims=3), elements=numbers)


def observed(
    *batches: Tensor, kind: type[Observer] = HistogramObserver, axis: int | None = None
) -> Observer:
    observer = kind("x", axis)
    for batch in batches:
        observer.observe(batch)
    return observer


def observed_whole(x: Tensor) -> Observer:
    return observed(*x.split(8192))  # small enough not to be sampled


def ranges(
    observer: Observer,
    method: str = "mse",
    spec: QuantSpec = ACTIVATION,
    percentile: float = 99.9,
) -> tuple[float, float]:
    ((low, high),) = choose_ranges([observer], [spec], [method], [percentile])
    return low.item(), high.item()


def error(x: Tensor, ends: tuple[float, float], spec: QuantSpec, method: str = "mse") -> float:
    qparams = choose_qparams(torch.tensor(ends[0]), torch.tensor(ends[1]), spec)
    fake = fake_quantize(x, qparams.scale, qparams.zero_point, spec.as_computed()).double()
    x = x.double()
    if method == "cosine":
        return 1 - (x @ fake / (x.norm() * fake.norm())).item()
    difference = fake - x
    return (difference.square() if method == "mse" else difference.abs()).sum().item()


def data(name: str) -> Tensor:
    random = np.random.default_rng(1)
    x = random.normal(size=30_000)
    x = {
        "normal": x,
        "relu": np.maximum(x, 0),
        "outliers": np.append(x, [40, -25, 38]),
        "skewed": np.exp(x) - 0.2,
        "uniform": random.uniform(-0.1, 1, 30_000),
        "silu": x / (1 + np.exp(-2 * x)),
    }[name]
    return torch.from_numpy(x.astype(np.float32))


def many_tensors() -> list[Observer]:
    torch.manual_seed(0)
    drawn = [torch.randn(500) * 3.0**i - (i % 3) for i in range(-20, 20)]
    return [observed(x.relu() if i % 4 else x) for i, x in enumerate(drawn)]


@given(values, st.sampled_from(SPECS))
@settings(deadline=None, max_examples=20)
def test_every_method_stays_within_what_was_seen(x: np.ndarray, spec: QuantSpec) -> None:
    observer = observed(torch.from_numpy(x))
    for method in METHODS:
        low, high = ranges(observer, method, spec)
        assert low <= high
        if method != "distribution" or spec.dtype.is_integer:
            assert min(observer.low, 0) <= low
            assert high <= max(observer.high, 0)


def test_minmax_and_ema_need_no_histogram() -> None:
    batches = torch.tensor([[-1.0, 4.0], [-3.0, 2.0]])
    for kind in (MinMaxObserver, HistogramObserver):
        observer = observed(*batches, kind=kind)
        assert ranges(observer, "minmax") == (-3, 4)
        assert ranges(observer, "percentile", percentile=100) == (-3, 4)
        moved = (pytest.approx(-1 - 0.01 * 2), pytest.approx(4 - 0.01 * 2))
        assert ranges(observer, "ema") == moved


@pytest.mark.parametrize("method", ["mse", "l1", "cosine"])
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("normal", ACTIVATION),
        ("relu", ACTIVATION),
        ("silu", ACTIVATION),
        ("silu", QuantSpec(dtype=UINT8, symmetric=False, restricted=True)),
        ("normal", QuantSpec(dtype=INT8)),
        ("normal", QuantSpec(dtype="int4")),
        ("outliers", ACTIVATION),
        ("outliers", QuantSpec(dtype=INT8)),
        ("outliers", QuantSpec(dtype="uint4", symmetric=False)),
        ("outliers", QuantSpec(dtype=INT8, power_of_two=True)),
        ("skewed", ACTIVATION),
        ("skewed", QuantSpec(dtype="float4e2m1")),
        ("uniform", ACTIVATION),
        ("normal", QuantSpec(dtype=INT16)),
        ("normal", QuantSpec(dtype="float8e5m2")),
        ("normal", QuantSpec(dtype="float4e2m1", scale_type="float8e8m0")),
    ],
    ids=str,
)
def test_least_error_is_near_brute_force_and_never_worse_than_minmax(
    name: str, spec: QuantSpec, method: str
) -> None:
    x = data(name)
    low, high = x.min().item(), x.max().item()
    grid = np.linspace(0.02, 1, 50)
    lows = [*grid, 0.0] if low < 0 else [1.0]
    ends = [(low * a, high * b) for b in grid for a in ([b] if spec.symmetric else lows)]
    ends = ends[:: 1 if len(ends) < 100 else 3]
    brute = min(error(x, e, spec, method) for e in ends)
    found = error(x, ranges(observed_whole(x), method, spec), spec, method)
    # Bins are not single values, and the ratios tried are some percent apart.
    assert found <= 1.03 * brute
    assert found <= 1.003 * error(x, (low, high), spec, method)


@pytest.mark.parametrize("name", ["normal", "relu", "outliers", "skewed", "uniform"])
@pytest.mark.parametrize("spec", [ACTIVATION, QuantSpec(dtype=INT8)], ids=str)
@pytest.mark.parametrize("method", ["mse", "l1", "cosine"])
def test_a_margin_buys_a_wider_range_for_no_more_error_than_it_allows(
    name: str, spec: QuantSpec, method: str
) -> None:
    x = data(name)
    observer = observed_whole(x)
    ends = [
        choose_ranges([observer], [spec], [method], [99.9], margin)[0] for margin in (0.0, 0.1, 0.5)
    ]
    plain, tenth, half = [(low.item(), high.item()) for low, high in ends]
    assert half[0] <= tenth[0] <= plain[0]
    assert plain[1] <= tenth[1] <= half[1]
    whole = error(x, (x.min().item(), x.max().item()), spec, method)
    for margin, found in ((0.1, tenth), (0.5, half)):
        # Bins are not single values, as above.
        assert error(x, found, spec, method) <= 1.03 * (1 + margin) * error(x, plain, spec, method)
        assert error(x, found, spec, method) <= 1.003 * whole


def test_a_margin_matters_where_there_are_tails() -> None:
    observer = observed_whole(data("normal"))
    widths = [
        float(torch.diff(torch.cat(choose_ranges([observer], [ACTIVATION], ["mse"], [99], m)[0])))
        for m in (0.0, 0.1)
    ]
    assert widths[0] * 1.02 < widths[1]


def test_zeros_and_a_lone_value_have_that_value_as_range() -> None:
    for method in ("mse", "l1", "entropy"):
        low, high = ranges(observed(torch.zeros(10), torch.tensor([3.0])), method)
        assert (low, high) == (0.0, pytest.approx(3.0, rel=0.01))
    for method in METHODS:
        assert ranges(observed(torch.zeros(10)), method) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_gets_the_same_range_in_any_company_bit_for_bit(method: str) -> None:
    observers = many_tensors()
    specs = [SPECS[i % len(SPECS)] for i in range(40)]
    together = choose_ranges(observers, specs, [method] * 40, [99.5] * 40)
    backwards = choose_ranges(observers[::-1], specs[::-1], [method] * 40, [99.5] * 40)[::-1]
    alone = [
        choose_ranges([o], [s], [method], [99.5])[0] for o, s in zip(observers, specs, strict=True)
    ]
    for ends in (backwards, alone):
        assert all(map(torch.equal, sum(together, ()), sum(ends, ())))


@pytest.mark.parametrize("spec", [ACTIVATION, QuantSpec(dtype=INT8)], ids=str)
def test_channels_get_the_ranges_of_tensors_of_their_own(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 70) * torch.linspace(-1, 1, 70).mul(6).exp2()
    x[:, 3::5] = x[:, 3::5].relu()
    whole = HistogramObserver("x", axis=1, bins=512)
    whole.observe(x)
    parts = [HistogramObserver("part", bins=512) for _ in range(70)]
    for part, column in zip(parts, x.unbind(1), strict=True):
        part.observe(column)
    for method in METHODS:
        (together,) = choose_ranges([whole], [spec], [method], [97.0])
        alone = choose_ranges(parts, [spec] * 70, [method] * 70, [97.0] * 70)
        for end in (0, 1):
            assert torch.equal(together[end], torch.cat([a[end] for a in alone])), method


def test_channels_whose_scales_share_a_unit_are_never_worse_than_minmax() -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    x *= torch.linspace(0, 5, 40).exp2()
    x[0, ::3] *= 6  # outliers
    spec = QuantSpec(dtype="int4", axis=1, scale_type="float8e4m3fn")
    observer = HistogramObserver("x", axis=1, bins=2048)
    observer.observe(x)
    errors = {}
    for method in ("minmax", "mse"):
        ((low, high),) = choose_ranges([observer], [spec], [method], [100])
        qparams = choose_qparams(low, high, spec)
        fake = fake_quantize(x, qparams.scale, qparams.zero_point, spec)
        errors[method] = (fake - x).double().square().sum(0)
    # The histogram knows values to a bin.
    assert (errors["mse"] <= 1.01 * errors["minmax"]).all()
    assert errors["mse"].sum() < 0.9 * errors["minmax"].sum()


def test_candidates_are_what_each_method_chooses() -> None:
    observers = [*many_tensors()[:5], observed(torch.ones(3), kind=MinMaxObserver)]
    specs, percentiles = [*SPECS[:5], ACTIVATION], [99.0, 99.9, 100.0, 99.0, 98.0, 99.0]
    found = candidate_ranges(observers, specs, percentiles)
    assert [list(each) for each in found] == [list(METHODS)] * 5 + [["minmax", "ema"]]
    for observer, spec, percentile, each in zip(observers, specs, percentiles, found, strict=True):
        for method, ends in each.items():
            (alone,) = choose_ranges([observer], [spec], [method], [percentile])
            assert all(map(torch.equal, ends, alone)), method


@pytest.mark.parametrize("method", METHODS)
def test_fewer_bins_move_the_ends_by_little(method: str) -> None:
    x = data("normal")
    ends = []
    for bins in (1024, 4096):
        observer = HistogramObserver("x", bins=bins)
        for piece in x.split(8192):
            observer.observe(piece)
        ends.append(ranges(observer, method))
    # Two bins of the coarser one; the errors' minimum is flat, and steps of the search 3 % apart.
    # Entropy depends on bins as such: a bin is the finest detail that it knows of.
    slack = {"entropy": 0.4, "mse": 0.1, "l1": 0.1, "cosine": 0.1}.get(method, 2 * 8 / 1024)
    np.testing.assert_allclose(*ends, rtol=0, atol=slack)


def test_wrong_requests_are_refused() -> None:
    observer = observed(torch.ones(3))
    with pytest.raises(ConfigError, match="no range method 'kl'; choose one of minmax, ema"):
        ranges(observer, "kl")
    with pytest.raises(ConfigError, match="percentile=101 must lie above 50"):
        ranges(observer, "percentile", percentile=101)
    for method in set(METHODS) - {"minmax", "ema"}:
        with pytest.raises(ConfigError, match=f"'x': method '{method}' needs a HistogramObserver"):
            ranges(observed(torch.ones(3), kind=MinMaxObserver), method)
