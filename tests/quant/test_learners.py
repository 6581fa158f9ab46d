"""What is learned of scale and zero point, against the formulas and against finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwrap.config import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.numerics import QParams, choose_qparams, fake_quantize, scale_shape, spread
from qwrap.quant.stubs import Stub

SHAPE = (6, 4, 10)
KINDS = ["uint8", "int8", "uint4", "int4", "int3", "uint16", "int16", "float8e4m3fn"]
LAYOUTS = {"tensor": (None, None), "channel": (1, None), "blocks": (2, 4)}
WAYS = ["lsq", "lsq+", "pact", "tqt"]


def make(kind, way, layout="tensor", stored=True, seed=0, shape=SHAPE):
    """A stub whose range cuts off some values, those values, and a gradient for its output."""
    dtype, (axis, block_size) = quant_type(kind), LAYOUTS[layout]
    spec = QuantSpec(
        dtype=dtype,
        symmetric=way != "lsq+",
        axis=axis,
        block_size=block_size,
        power_of_two=way == "tqt",
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    ends = torch.rand(scale_shape(shape, spec), generator=generator) + 0.5
    stub = Stub("t", spec, ends.shape, stored=stored, training_by=way)
    stub.set_qparams(choose_qparams(-ends, 1.3 * ends, spec))
    stub.mode = "quantize"
    return stub, x, upstream


def all_cases():
    for way in WAYS:
        for kind in KINDS:
            if way == "lsq+" and not quant_type(kind).has_zero_point:
                continue
            yield way, kind, "tensor", False
            if way != "pact":  # which is for activations
                yield from ((way, kind, layout, True) for layout in LAYOUTS)


def parts(stub, x):
    """Rounded and unrounded steps from zero, and which elements were clamped; float64."""
    scale, zero_point = (
        spread(v, x.shape, stub.spec).expand(x.shape) for v in (stub.scale, stub.zero_point)
    )
    t, zero = (x / scale).double(), zero_point.double()
    rounded = (
        (fake_quantize(x, stub.scale, stub.zero_point, stub.grid) / scale).double()
        if stub.spec.dtype.levels
        else t.round()
    )
    code = t if stub.spec.dtype.levels else rounded + zero
    return t, rounded, zero, code < stub.grid.qmin, code > stub.grid.qmax


def grouped(stub, values):
    """Sum over the elements that share a scale, one by one."""
    owner = torch.arange(stub.scale.numel()).reshape(stub.scale.shape)
    owner = spread(owner, values.shape, stub.spec).expand(values.shape).reshape(-1)
    sums = np.zeros(stub.scale.numel())
    np.add.at(sums, owner.numpy(), values.double().reshape(-1).numpy())
    return sums.reshape(tuple(stub.scale.shape))


def balance(stub, x):
    """LSQ's g: of the weights that share a scale, or the features of one sample."""
    shared = x.numel() // stub.scale.numel() if stub.stored else x[0].numel()
    low, high = stub.grid.qmin - stub.zero_point, stub.grid.qmax - stub.zero_point
    return 1 / np.sqrt(shared * torch.maximum(-low, high).double().numpy())


def gradients(stub, x, upstream):
    stub.zero_grad()
    stub(x.clone().requires_grad_()).backward(upstream)
    return {kind: p.grad.double().numpy() for kind, p in stub.trained().items()}


def slack(stub, upstream):
    """What the residual of one element may be off, times all gradients of a scale.

    An activation keeps it to the nearest 1/252; and t has a rounding error of float32.
    """
    levels = stub.spec.dtype.levels is not None
    each = 1 / 504 if not stub.stored and not levels else 0
    each += 2.0**-23 * max(abs(stub.grid.qmin), stub.grid.qmax)
    return each * grouped(stub, upstream.abs()) + 1e-6


def assert_close(found, wanted, allowed):
    assert np.all(np.abs(found - wanted) <= allowed + 1e-5 * np.abs(wanted))


CASES = list(all_cases())


# --- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "kind", "layout", "stored"), CASES)
def test_gradients_are_those_of_the_papers(way, kind, layout, stored) -> None:
    stub, x, upstream = make(kind, way, layout, stored)
    t, rounded, zero, below, above = parts(stub, x)
    assert below.any()
    assert above.any()
    low, high = stub.grid.qmin - zero, stub.grid.qmax - zero
    by_scale = torch.where(below, low, torch.where(above, high, rounded - t))
    of_scale = grouped(stub, upstream * by_scale)
    scale, g, allowed = stub.scale.double().numpy(), balance(stub, x), slack(stub, upstream)
    found = gradients(stub, x, upstream)
    if way in ("lsq", "lsq+"):
        assert_close(found["scale"], g / scale * of_scale, g / scale * allowed)
    if way == "lsq+":
        # the offset beta = -scale * z; a step of size g * dL/dbeta moves it as in the paper
        of_offset = grouped(stub, upstream * (below | above))
        codes = stub.grid.qmax - stub.grid.qmin
        assert_close(found["zero_point"], -g * of_offset / (scale * codes), 1e-6 * g / scale)
    if way == "tqt":
        assert_close(found["scale"], of_scale * scale * math.log(2), allowed * scale)
    if way == "pact":
        reach = torch.maximum(-low, high)
        by_clip = torch.where(below, low, torch.where(above, high, 0.0)) / reach
        assert_close(found["clip"], grouped(stub, upstream * by_clip), 1e-5)


# --- finite differences --------------------------------------------------------------------------


class Relaxed:
    """The fake-quantization in float64 with all rounding errors held constant."""

    def __init__(self, stub, x, upstream):
        self.stub, self.x, self.spec = stub, x.double(), stub.grid
        t, rounded, zero, below, above = parts(stub, x)
        inside = ~(below | above)
        # A code at the very end has one derivative to its left and another to its right.
        at_end = (rounded + zero == self.spec.qmin) | (rounded + zero == self.spec.qmax)
        self.upstream = upstream.double() * ~(inside & at_end)
        self.residual = torch.where(inside, rounded - t, 0.0)
        self.scale = stub.scale.double()
        self.zero = stub.zero_point.double()

    def spread(self, values):
        return spread(values, self.x.shape, self.spec)

    def by_scale(self, scale, zero=None):
        """Sum of upstream * scale * clip(x / scale + residual), one for each scale."""
        scale, zero = self.spread(scale), self.spread(self.zero if zero is None else zero)
        steps = self.x / scale + self.residual
        return self._sum(scale * steps.clamp(self.spec.qmin - zero, self.spec.qmax - zero))

    def by_clip(self, clip):
        """The same for a clip in real units, without rounding."""
        low, high = self.spec.qmin - self.zero, self.spec.qmax - self.zero
        unit = clip / torch.maximum(-low, high)
        return self._sum(self.x.clamp(self.spread(low * unit), self.spread(high * unit)))

    def _sum(self, values):
        return grouped(self.stub, values * self.upstream)


def derivative(function, at, step):
    return (function(at + step) - function(at - step)) / (2 * step)


@pytest.mark.parametrize(("way", "kind", "layout", "stored"), CASES)
def test_gradients_are_finite_differences_of_the_relaxation(way, kind, layout, stored) -> None:
    stub, x, upstream = make(kind, way, layout, stored, seed=1)
    relaxed = Relaxed(stub, x, upstream)
    upstream = relaxed.upstream.float()
    found = gradients(stub, x, upstream)
    g, scale = balance(stub, x), relaxed.scale.numpy()
    # The difference of two float64 sums, over a step of 1e-7, is right to about 1e-6 of the sums.
    allowed = slack(stub, upstream) + 1e-5
    if way == "tqt":
        power = derivative(
            lambda u: relaxed.by_scale(relaxed.scale * 2.0**u), torch.zeros(()).double(), 1e-7
        )
        assert_close(found["scale"], power, allowed * scale)
    elif way == "pact":
        reach = torch.maximum(stub.grid.qmax - relaxed.zero, relaxed.zero - stub.grid.qmin)
        clip = derivative(relaxed.by_clip, relaxed.scale * reach, 1e-6)
        assert_close(found["clip"], clip, 1e-4)
    else:
        relative = derivative(
            lambda u: relaxed.by_scale(relaxed.scale * (1 + u)), torch.zeros(()).double(), 1e-7
        )
        assert_close(found["scale"], g / scale**2 * relative, g / scale * allowed)
    if way == "lsq+":
        moved = derivative(lambda u: relaxed.by_scale(relaxed.scale, relaxed.zero + u), 0.0, 1e-5)
        codes = stub.grid.qmax - stub.grid.qmin
        assert_close(found["zero_point"], g * moved / (scale**2 * codes), g / scale * allowed)


# --- where training starts, and how far it goes --------------------------------------------------

SCALE_TYPES = ["float32", "float16", "bfloat16", "float8e8m0", "float8e4m3fn"]


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    scale_type=st.sampled_from(SCALE_TYPES),
    exponent=st.integers(-60, 20),
    seed=st.integers(0, 10**6),
)
def test_training_starts_at_the_very_scale_that_was_chosen(way, scale_type, exponent, seed) -> None:
    power = way == "tqt"
    spec = QuantSpec(dtype="int4", axis=0, power_of_two=power, scale_type=scale_type)
    ends = torch.rand(64, generator=torch.Generator().manual_seed(seed)) + 0.01
    qparams = choose_qparams(-ends * 2.0**exponent, ends * 2.0**exponent, spec)
    stub = Stub("w", spec, (64,), stored=True, training_by=way)
    stub.set_qparams(qparams)
    assert torch.equal(stub.scale, qparams.scale)


@pytest.mark.parametrize("way", ["fixed", *WAYS])
def test_a_scale_smaller_than_any_chosen_one_is_kept(way) -> None:
    """As the user, or a file, may give it."""
    stub = Stub("t", QuantSpec(dtype="int8", power_of_two=way == "tqt"), training_by=way)
    tiny = torch.tensor([2.0**-80])
    stub.set_qparams(QParams(tiny, torch.zeros(1, dtype=torch.int32)))
    assert torch.equal(stub.scale, tiny)


@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_lsq_plus_starts_at_the_very_zero_point_that_was_chosen(zero_point) -> None:
    stub = Stub("t", QuantSpec(dtype="uint8", symmetric=False), training_by="lsq+")
    stub.set_qparams(QParams(torch.ones(1), torch.tensor([zero_point], dtype=torch.int32)))
    assert stub.zero_point.tolist() == [zero_point]
    assert stub.zero_point.dtype == torch.int32


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("way", WAYS)
def test_no_scale_passes_its_limit_and_none_is_stuck_there(way, optimizer) -> None:
    spec = QuantSpec(dtype="uint8", symmetric=False, power_of_two=way == "tqt")
    stub = Stub("t", spec, training_by=way)
    zero, limit = torch.zeros(1, dtype=torch.int32), 6 / 255
    if way == "tqt":
        limit = 2.0**-6
    stub.set_qparams(QParams(torch.tensor([2.0**-7]), zero), limit)
    stub.mode = "quantize"
    made = optimizer(stub.parameters(), lr=0.05)
    x, up, down = torch.full((2, 8), 9.0), -torch.ones(2, 8), torch.ones(2, 8)
    seen = []
    for step in range(300):  # every value is cut off: larger ones are wanted, then smaller ones
        made.zero_grad()
        stub(x.clone().requires_grad_()).backward(up if step < 100 else down)
        if step == 99:
            assert not next(stub.parameters()).grad.any()  # or it would wander off behind the limit
        made.step()
        seen.append(float(stub.scale))
    assert max(seen) == seen[99] == np.float32(limit)
    assert seen[-1] < limit


# --- what is learned -----------------------------------------------------------------------------


def mean_squared_error(w, scale, zero_point, spec):
    codes = (w / scale).round().add(zero_point).clamp(spec.qmin, spec.qmax)
    return float(((codes - zero_point) * scale - w).square().mean())


def stationary(w, spec):
    """The scale where the paper's gradient of the squared error changes sign, by bisection."""
    low, high = 1e-3, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        t = w / middle
        inside = t.round().clamp(spec.qmin, spec.qmax) == t.round()
        by_scale = torch.where(inside, t.round() - t, t.round().clamp(spec.qmin, spec.qmax))
        error = t.round().clamp(spec.qmin, spec.qmax) * middle - w
        low, high = (low, middle) if (error * by_scale).sum() > 0 else (middle, high)
    return (low + high) / 2


@pytest.mark.parametrize("times", [1 / 3, 3.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("dtype", "step"), [("int2", 0.06), ("int3", 0.015), ("int4", 0.015)])
def test_lsq_reaches_the_optimal_step_size(dtype, step, optimizer, times) -> None:
    """From a third and from three times of the optimum, on Gaussian weights.

    The paper's gradient is zero a little beside the least squared error, because it lets weights
    move with their scale: by 5 % of the step size at 2 bits and 1 % at 3 and 4, computed here by
    bisection in float64. The error itself is within 1 % of the least that a fine grid finds.
    """
    spec = QuantSpec(dtype=dtype)
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(0.1, 2.0, 381)
    errors = [mean_squared_error(w, scale, 0, spec) for scale in grid]
    least, best = min(errors), float(grid[int(np.argmin(errors))])
    stub = Stub("w", spec, stored=True, training_by="lsq")
    stub.set_qparams(QParams(torch.tensor([best * times]), torch.zeros(1, dtype=torch.int32)))
    stub.mode = "quantize"
    if optimizer == "sgd":
        made = torch.optim.SGD(stub.parameters(), lr=0.04)
    else:  # an average that forgets how steep it was at the start
        made = torch.optim.Adam(stub.parameters(), lr=0.03, betas=(0.9, 0.98))
    cool = torch.optim.lr_scheduler.CosineAnnealingLR(made, 500)
    for _ in range(500):
        made.zero_grad()
        (stub(w.requires_grad_()) - w.detach()).square().mean().mul(200).backward()
        made.step()
        cool.step()
    reached = float(stub.scale)
    assert reached == pytest.approx(stationary(w.detach().double(), spec), rel=2e-3)
    assert reached == pytest.approx(best, rel=step)
    assert mean_squared_error(w.detach(), reached, 0, spec) < 1.01 * least


@pytest.mark.parametrize("start", [0, 8, 15])
def test_lsq_plus_finds_the_zero_point_of_a_shifted_distribution(start) -> None:
    spec = QuantSpec(dtype="uint4", symmetric=False)
    x = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)) + 0.8
    best = min(
        (mean_squared_error(x, scale, zero, spec), zero)
        for scale in torch.linspace(0.2, 0.6, 41)
        for zero in range(16)
    )
    stub = Stub("t", spec, training_by="lsq+")
    stub.set_qparams(QParams(torch.tensor([0.4]), torch.tensor([start], dtype=torch.int32)))
    stub.mode = "quantize"
    made = torch.optim.Adam(stub.parameters(), lr=0.03)
    cool = torch.optim.lr_scheduler.CosineAnnealingLR(made, 600)
    for _ in range(600):
        made.zero_grad()
        (stub(x.requires_grad_()) - x.detach()).square().sum().backward()
        made.step()
        cool.step()
    reached = mean_squared_error(x.detach(), float(stub.scale), int(stub.zero_point), spec)
    assert abs(int(stub.zero_point) - best[1]) <= 1
    assert reached < 1.03 * best[0]


@pytest.mark.parametrize("times", [0.3, 3.0])
def test_tqt_finds_the_power_of_two_next_to_the_best_scale(times) -> None:
    spec = QuantSpec(dtype="int4", power_of_two=True)
    w = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    errors = {2.0**k: mean_squared_error(w, 2.0**k, 0, spec) for k in range(-6, 3)}
    best = min(errors, key=errors.__getitem__)
    stub = Stub("w", spec, stored=True, training_by="tqt")
    far = choose_qparams(*(torch.tensor(e * times * 4) for e in (-1.0, 1.0)), spec)
    stub.set_qparams(far)
    stub.mode = "quantize"
    made = torch.optim.Adam(stub.parameters(), lr=0.02)
    for _ in range(300):
        made.zero_grad()
        (stub(w.requires_grad_()) - w.detach()).square().mean().backward()
        made.step()
    assert float(stub.scale) in (best / 2, best, best * 2)
    assert errors[float(stub.scale)] < 2 * errors[best]


def test_pact_with_decay_finds_a_clip_below_the_largest_value() -> None:
    spec = QuantSpec(dtype="uint4", symmetric=False)
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).relu()
    stub = Stub("t", spec, training_by="pact")
    stub.set_qparams(choose_qparams(torch.zeros(1), x.max().reshape(1), spec))
    stub.mode = "quantize"
    made = torch.optim.SGD(stub.parameters(), lr=1.0, weight_decay=0.02)
    for _ in range(300):
        made.zero_grad()
        (stub(x.requires_grad_()) - x.detach()).square().mean().backward()
        made.step()
    alpha = float(stub.trained()["clip"].detach())
    assert 0 < alpha < 0.9 * float(x.detach().max())
    assert float(stub.scale) == pytest.approx(alpha / 15, rel=1e-6)
    # The decay pulls as hard as what is cut off pushes.
    cut_off = (x.detach() - alpha).clamp(min=0).sum() * 2 / x.numel()
    assert float(cut_off) == pytest.approx(0.02 * alpha, rel=0.1)
