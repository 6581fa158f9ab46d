"""The passes behind learned scales, against fake_quantize and against sums in float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType, quant_type
from qwrap.errors import ConfigError, QwrapWarning
from qwrap.fused import Needs, backward_kept, backward_recomputed, compiling, forward, use
from qwrap.fused.compiling import How
from qwrap.numerics import fake_quantize

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ALL = Needs()
both = pytest.mark.parametrize("how", ["eager", "compiled"])
SHAPES = [(1, 1, 5000), (1, 7, 300), (300, 7, 1), (5, 7, 60), (6, 1, 50), (1, 1, 1), (0, 3, 4)]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with use("eager"):
        yield


def made(
    shape: tuple[int, ...], dtype: QuantType, *, like: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Values over a third more than the range of the codes, a tenth of them ties."""
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]
    scale = torch.rand(channels, generator=generator) * 0.1 + 0.01
    zero_point = torch.randint(dtype.qmin, dtype.qmax + 1, (channels,), generator=generator)
    zero_point = zero_point.to(torch.int32)
    width = dtype.qmax - dtype.qmin
    codes = (torch.rand(shape, generator=generator) * 4 / 3 - 1 / 6) * width + dtype.qmin
    ties = torch.rand(shape, generator=generator) < 0.1
    codes = torch.where(ties, codes.round() + 0.5, codes)
    return ((codes - zero_point[:, None]) * scale[:, None]).to(like), scale, zero_point


def random_gradient(shape: tuple[int, ...], like: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def in_float64(
    gradient: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, dtype: QuantType
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of x, the three sums, and the sum of the absolute gradient, channel by channel."""
    through = torch.zeros_like(gradient)
    sums = torch.zeros(4, x.shape[1], dtype=torch.float64)
    for c in range(x.shape[1]):
        g, steps = gradient[:, c].double(), (x[:, c].float() / scale[c]).double()
        code = steps.round() + zero_point[c]
        below, above = code < dtype.qmin, code > dtype.qmax
        inside = (code >= dtype.qmin) & (code <= dtype.qmax)
        sums[0, c] = (g * (steps.round() - steps))[inside].sum()
        sums[1, c], sums[2, c] = g[below].sum(), g[above].sum()
        sums[3, c] = g.abs().sum()
        through[:, c] = (g * inside).to(gradient.dtype)
    return through, sums[0], sums[1], sums[2], sums[3]


@pytest.mark.parametrize("like", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["uint8", "int8", "int4", "int2", "uint16"])
def test_the_value_is_fake_quantize_bit_for_bit(
    name: str, shape: tuple[int, ...], like: torch.dtype
) -> None:
    dtype = quant_type(name)
    x, scale, zero_point = made(shape, dtype, like=like)
    spec = QuantSpec(dtype=dtype, symmetric=False, axis=1)
    values, _ = forward(x, scale, zero_point, dtype.qmin, dtype.qmax, keep=True)
    expected = fake_quantize(x, scale, zero_point, spec)
    assert values.dtype == like
    assert torch.equal(values, expected)


@pytest.mark.parametrize("like", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [True, False])
def test_the_gradients_are_those_of_a_loop_in_float64(
    shape: tuple[int, ...], like: torch.dtype, kept: bool
) -> None:
    dtype = quant_type("int8")
    x, scale, zero_point = made(shape, dtype, like=like)
    gradient = random_gradient(shape, like)
    through, inside, below, above, size = in_float64(gradient, x, scale, zero_point, dtype)
    if kept:
        _, saved = forward(x, scale, zero_point, dtype.qmin, dtype.qmax, keep=True)
        assert saved is not None
        got = backward_kept(gradient, saved, needs=ALL)
    else:
        got = backward_recomputed(
            gradient, x, scale, zero_point, dtype.qmin, dtype.qmax, needs=Needs()
        )
    assert got.x is not None
    assert torch.equal(got.x, through)
    # A tree of float32 sums errs by log2(N) roundings; the kept residual by half of 1/252.
    bound = size * (math.log2(max(x.numel(), 2)) * 2**-24)
    for sums, expected, slack in (
        (got.inside, inside, size / 504 if kept else 0),
        (got.below, below, 0),
        (got.above, above, 0),
    ):
        assert sums is not None
        assert sums.dtype == torch.float32
        assert ((sums - expected).abs() <= bound + slack).all()


def test_nan_and_infinity_keep_what_they_mean() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3]).reshape(1, 1, -1)
    scale, zero_point = torch.tensor([0.25]), torch.tensor([2], dtype=torch.int32)
    values, kept = forward(x, scale, zero_point, -8, 7, keep=True)
    assert kept is not None
    assert values[0, 0, 0].isnan()
    assert values[0, 0, 1:].tolist() == [1.25, -2.5, 0.25]
    assert kept.flatten().tolist() == [-127, 127, -128, -50]  # rint(252 * (1 - 1.2))
    gradient = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 1, -1)
    for got in (
        backward_kept(gradient, kept, needs=ALL),
        backward_recomputed(gradient, x, scale, zero_point, -8, 7, needs=ALL),
    ):
        assert got.x is not None
        assert got.x.flatten().tolist() == [0, 0, 0, 8]
        assert (got.below.item(), got.above.item()) == (4, 2)  # type: ignore[union-attr]  # wanted
        assert abs(got.inside.item() + 1.6) < 8 / 504  # type: ignore[union-attr]  # wanted


def test_only_what_is_needed_is_given() -> None:
    x, scale, zero_point = made((1, 1, 100), quant_type("int8"))
    _, kept = forward(x, scale, zero_point, -128, 127, keep=True)
    assert kept is not None
    assert forward(x, scale, zero_point, -128, 127, keep=False)[1] is None
    for needs in (Needs(x=True, sums=False), Needs(x=False, sums=True)):
        for got in (
            backward_kept(x, kept, needs=needs),
            backward_recomputed(x, x, scale, zero_point, -128, 127, needs=needs),
        ):
            assert (got.x is not None) == needs.x
            assert all((s is not None) == needs.sums for s in got[1:])


@pytest.mark.parametrize(
    ("shape", "like"),
    [
        ((1, 1, 5000), torch.float32),
        ((1, 1, 5000), torch.bfloat16),
        ((1, 7, 300), torch.float16),
        ((301, 7, 1), torch.float64),
        ((320, 7, 1), torch.float32),
        ((5, 7, 60), torch.float32),
    ],
)
def test_compiled_is_eager_bit_for_bit(shape: tuple[int, ...], like: torch.dtype) -> None:
    dtype = quant_type("int8")
    x, scale, zero_point = made(shape, dtype, like=like)
    x[0, 0, :1], x[-1, -1, -1:] = math.nan, math.inf
    gradient = random_gradient(shape, like)
    _, inside, below, above, size = in_float64(gradient, x, scale, zero_point, dtype)
    bound = size * (math.log2(x.numel()) * 2**-24)  # as for eager
    results = {}
    for how in ("eager", "compiled"):
        with use(how):
            values, kept = forward(x, scale, zero_point, dtype.qmin, dtype.qmax, keep=True)
            assert kept is not None
            results[how] = [values, kept]
            for got, slack in (
                (backward_kept(gradient, kept, needs=ALL), size / 504),
                (backward_recomputed(gradient, x, scale, zero_point, -128, 127, needs=ALL), 0),
            ):
                assert got.x is not None
                results[how].append(got.x)
                assert got.inside is not None
                assert ((got.inside - inside).abs() <= bound + slack).all()
                assert got.below is not None
                assert ((got.below - below).abs() <= bound).all()
                assert got.above is not None
                assert ((got.above - above).abs() <= bound).all()
    for a, b in zip(results["eager"], results["compiled"], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(-77), b.nan_to_num(-77))


def test_a_compiled_division_is_the_ieee_division() -> None:
    """Where multiplying by the inverse of the scale gives another code."""
    scale = torch.tensor([0.1])
    x = (torch.arange(-(2**16), 2**16) + 0.5).to(torch.float32) * scale
    x = torch.cat([x, torch.nextafter(x, x * 2), torch.nextafter(x, x * 0)]).reshape(1, 1, -1)
    expected = (x.numpy() / scale.numpy()).round()  # numpy: float32, half to even
    assert not torch.equal(torch.from_numpy(expected), (x * (1 / scale)).round())
    zero_point = torch.zeros(1, dtype=torch.int32)
    with use("compiled"):
        values, _ = forward(x, scale, zero_point, -(2**20), 2**20, keep=False)
    assert torch.equal(values, torch.from_numpy(expected) * scale)


def test_sizes_share_one_compiled_kernel() -> None:
    zero_point = torch.zeros(1, dtype=torch.int32)
    with use("compiled"):
        forward(torch.ones(1, 1, 10), torch.ones(1), zero_point, -8, 7, keep=False)
        before = counters["stats"]["unique_graphs"]
        for size, qmin, qmax in ((2, 0, 1), (3, -1, 0), (4096, 0, 255), (70_000, -128, 127)):
            forward(torch.ones(size, 1, 2), torch.ones(1), zero_point, qmin, qmax, keep=False)
        assert counters["stats"]["unique_graphs"] == before
        per_channel = torch.ones(3), torch.zeros(3, dtype=torch.int32)
        forward(torch.ones(1, 3, 10), *per_channel, -8, 7, keep=False)
        assert counters["stats"]["unique_graphs"] == before + 1


@both
def test_sums_over_many_elements_repeat_and_stay_accurate(
    how: How,
) -> None:
    x, scale, zero_point = made((1, 1, 3_000_001), quant_type("uint8"))
    gradient = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) + 1
    _, inside, below, above, _ = in_float64(gradient, x, scale, zero_point, quant_type("uint8"))
    arguments = gradient, x, scale, zero_point, 0, 255
    with use(how):
        first = backward_recomputed(*arguments, needs=ALL)
        again = backward_recomputed(*arguments, needs=ALL)
    for got, repeated, expected in zip(first[1:], again[1:], (inside, below, above), strict=True):
        assert got is not None
        assert repeated is not None
        assert torch.equal(got, repeated)
        # Half a million numbers above 1: added one by one in float32 they would err by 1e-3.
        assert (got - expected).abs() <= 1e-6 * gradient.sum()


@both
def test_views_and_other_strides_give_the_same(how: How) -> None:
    x, scale, zero_point = made((5, 7, 60), quant_type("int8"))
    strided = torch.empty(60, 7, 5).permute(2, 1, 0).copy_(x)
    flat, one = x[:, :1].expand(5, 1, 60), scale[:1]
    with use(how):
        for a, b, s, z in (
            (x, strided, scale, zero_point),
            (flat, x[:, :1], one, zero_point[:1]),
        ):
            results = [forward(v, s, z, -128, 127, keep=True) for v in (a, b)]
            assert results[0][0].shape == a.shape
            for left, right in zip(*results, strict=True):
                assert torch.equal(left, right)
            gradients = [
                backward_kept(v, k, needs=ALL) for v, (_, k) in zip((a, b), results, strict=True)
            ]
            assert torch.equal(gradients[0].x, gradients[1].x)


def test_auto_compiles_large_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_broken", [])
    with use("auto"):
        assert compiling.is_worthwhile(torch.empty(1, 1, 2**16))
        assert not compiling.is_worthwhile(torch.empty(1, 1, 2**16 - 1))
        with use("compiled"):
            assert compiling.is_worthwhile(torch.empty(1, 1, 1))
        with use("eager"):
            assert not compiling.is_worthwhile(torch.empty(1, 1, 2**20))
        monkeypatch.setattr(compiling, "_process", [-1])  # that of a parent
        assert not compiling.is_worthwhile(torch.empty(1, 1, 2**20))
    with pytest.raises(ConfigError, match=r"use\('fast'\): expected one of auto, compiled, eager"):
        use("fast")  # type: ignore[arg-type]  # that is the point


def test_without_a_compiler_it_warns_once_and_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_broken", [])
    monkeypatch.setattr(compiling, "_compiled", {})
    x, scale, zero_point = made((1, 1, 2**16), quant_type("int8"))
    with use("eager"):
        expected = forward(x, scale, zero_point, -128, 127, keep=True)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with use("auto"), pytest.warns(QwrapWarning, match=r"run uncompiled.*compiler"):
            got = forward(x, scale, zero_point, -128, 127, keep=True)
        assert all(map(torch.equal, got, expected))
        with use("auto"):  # warnings are errors here: there is no second one
            got = forward(x, scale, zero_point, -128, 127, keep=True)
        assert all(map(torch.equal, got, expected))
        with use("compiled"), pytest.raises(ConfigError, match=r"cannot be compiled.*compiler"):
            forward(x, scale, zero_point, -128, 127, keep=True)


def test_inside_a_compiled_model_the_passes_are_plain_operations() -> None:
    x, scale, zero_point = made((1, 1, 500), quant_type("int8"))

    def twice(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, kept = forward(x, scale, zero_point, -128, 127, keep=True)
        got = backward_kept(gradient, kept, needs=Needs(x=True, sums=False))
        return values, got.x

    gradient = torch.ones_like(x)
    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x, gradient), twice(x, gradient), strict=True):
        assert torch.equal(got, expected)
