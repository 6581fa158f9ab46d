"""Learned rounding: its grid, its gradients and its regularizer, against the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwrap.config import QuantSpec
from qwrap.dtypes import codebook_type, quant_type
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.numerics import choose_qparams, fake_quantize, quantize, scale_shape, spread
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.soft_round import SoftRound, rectified, unrectified

SHAPE = (6, 5, 10)
LAYOUTS = {"tensor": (None, None), "channel": (1, None), "last": (2, None), "blocks": (2, 4)}
KINDS = ["int2", "uint2", "int3", "int4", "uint4", "int8", "uint8", "int16"]


def make(kind="int4", layout="channel", seed=0, cut=0.7, **spec):
    """A stub whose range cuts off some of the weights, and these."""
    axis, block_size = LAYOUTS[layout]
    spec.setdefault("symmetric", False)
    made = QuantSpec(dtype=quant_type(kind), axis=axis, block_size=block_size, **spec)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator)
    ends = cut + torch.rand(scale_shape(SHAPE, made), generator=generator)
    stub = Stub("w", made, ends.shape, stored=True)
    stub.set_qparams(choose_qparams(-ends, 1.3 * ends, made))
    stub.mode = "quantize"
    return weight, stub


def by_stub(x, stub):
    return fake_quantize(x, stub.scale, stub.zero_point, stub.grid)


def learn(rounding, by):
    """Move all that has a gradient at random."""
    rounding(rounding.lower).sum().backward()
    with torch.no_grad():
        rounding.variable += by * torch.randn(SHAPE) * (rounding.variable.grad != 0)


def ends_of(stub):
    """Smallest and largest value of each weight's grid."""
    scale, zero = (spread(v, SHAPE, stub.spec).double() for v in (stub.scale, stub.zero_point))
    return (stub.grid.qmin - zero) * scale, (stub.grid.qmax - zero) * scale


specs = st.one_of(
    st.fixed_dictionaries({"symmetric": st.booleans()}),
    st.just({"power_of_two": True}),
    st.just({"scale_type": "float16"}),
    st.just({"scale_type": "bfloat16"}),
    st.just({"symmetric": True, "scale_type": "float8e8m0"}),
)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(list(LAYOUTS)),
    spec=specs,
    seed=st.integers(0, 2**20),
    spread_of=st.floats(0, 30),
)
def test_what_is_deployed_is_a_fixed_point_of_the_stub_one_code_from_floor_at_most(
    kind, layout, spec, seed, spread_of
) -> None:
    weight, stub = make(kind, layout, seed, **spec)
    rounding = SoftRound(weight, stub)
    learn(rounding, spread_of)
    hard = rounding.hard()
    assert hard.dtype == torch.float32
    assert torch.equal(by_stub(hard, stub), hard)
    qparams = stub.qparams
    codes = quantize(hard, qparams, stub.grid).int()
    scale, zero = spread(qparams.scale, SHAPE, qparams), spread(qparams.zero_point, SHAPE, qparams)
    floor = (weight / scale).floor() + zero
    floor = floor.clamp(stub.grid.qmin - 1, stub.grid.qmax)
    assert set((codes - floor).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "spec", [{"narrow_range": True, "symmetric": True}, {"reduce_range": True}]
)
def test_codes_that_the_grid_leaves_out_are_not_chosen(spec) -> None:
    weight, stub = make("int8", **spec)
    rounding = SoftRound(10 * weight, stub)
    learn(rounding, 50.0)
    codes = quantize(rounding.hard(), stub.qparams, stub.spec).int()
    assert codes.min() >= stub.grid.qmin
    assert codes.max() <= stub.grid.qmax


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_float_weight_within_the_range_and_at_its_end_beyond(kind, layout) -> None:
    weight, stub = make(kind, layout)
    low, high = ends_of(stub)
    wanted = torch.minimum(torch.maximum(weight.double(), low), high)
    error = (SoftRound(weight, stub)(weight) - wanted) / spread(stub.scale, SHAPE, stub.spec)
    # A ten thousandth of a step: no weight starts nearer to a code, so that all can learn.
    assert error.abs().max() < 1.1e-4 + 2e-7 * max(abs(stub.spec.qmin), stub.spec.qmax)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_rounds_to_nearest(kind) -> None:
    weight, stub = make(kind, "channel")
    assert torch.equal(SoftRound(weight, stub).hard(), by_stub(weight, stub))


def test_gradients_are_those_of_finite_differences() -> None:
    weight, stub = make()
    rounding = SoftRound(weight, stub)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (rounding(weight) * upstream).sum().backward()
    step, found = 1e-3, rounding.variable.grad.clone()
    start = rounding.variable.detach().clone()
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            rounding.variable.copy_(start + sign * step)
            moved.append(rounding(weight).double())
    wanted = (moved[0] - moved[1]) / (2 * step) * upstream
    # Differences of float32 numbers near 1, over 2e-3.
    torch.testing.assert_close(found.double(), wanted, atol=5e-4, rtol=1e-2)


def test_weights_beyond_the_range_have_no_gradient_and_all_others_have_one() -> None:
    weight, stub = make()
    rounding = SoftRound(weight, stub)
    rounding(weight).sum().backward()
    low, high = ends_of(stub)
    inside = (weight > low) & (weight < high)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(rounding.variable.grad != 0, inside)


def test_weights_beyond_the_range_stay_at_its_ends_whatever_is_learned() -> None:
    weight, stub = make()
    rounding = SoftRound(weight, stub)
    optimizer = torch.optim.Adam(rounding.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        (rounding(weight).sum() + rounding.regularizer(2.0)).backward()
        optimizer.step()
    low, high = ends_of(stub)
    hard = rounding.hard().double()
    torch.testing.assert_close(hard[weight < low], low.expand(SHAPE)[weight < low])
    torch.testing.assert_close(hard[weight > high], high.expand(SHAPE)[weight > high])


def test_the_rectified_sigmoid_reaches_its_ends_and_is_undone() -> None:
    ends = rectified(torch.tensor([-3.0, 0.0, 3.0]))
    assert ends.tolist() == [0.0, 0.5, 1.0]
    shares = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified(unrectified(shares)), shares, atol=1e-6, rtol=0)
    # -ln(1.2 / (f + 0.1) - 1), by hand for f = 0.2
    assert float(unrectified(torch.tensor(0.2))) == pytest.approx(-np.log(3.0))


@pytest.mark.parametrize("beta", [2.0, 5.5, 20.0])
def test_the_regularizer_is_that_of_the_paper_with_its_gradient(beta) -> None:
    weight, stub = make(cut=3.0)
    rounding = SoftRound(weight, stub)
    variable = rounding.variable.detach().double().requires_grad_()
    share = (torch.sigmoid(variable) * 1.2 - 0.1).clamp(0, 1)
    wanted = (1 - (2 * share - 1).abs() ** beta).sum()
    wanted.backward()
    found = rounding.regularizer(beta)
    found.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(rounding.variable.grad.double(), variable.grad, rtol=1e-4, atol=1e-6)


def test_the_regularizer_is_one_for_each_weight_in_the_middle_and_zero_where_decided() -> None:
    weight, stub = make(cut=5.0)
    rounding = SoftRound(weight, stub)
    with torch.no_grad():
        rounding.variable.zero_()
    assert float(rounding.regularizer(20.0).detach()) == weight.numel()
    with torch.no_grad():
        rounding.variable.copy_(torch.where(weight > 0, 4.0, -4.0))
    assert float(rounding.regularizer(2.0).detach()) == 0.0


def test_started_from_codes_it_keeps_them_within_reach_and_begins_as_near_as_it_can() -> None:
    weight, stub = make(cut=3.0)
    step = spread(stub.scale, SHAPE, stub.spec)
    before = by_stub(weight + 1.5 * step * torch.sign(torch.randn(SHAPE)), stub)
    rounding = SoftRound(before, stub, start=weight)
    with torch.no_grad():
        lower, upper = (rounding.lower + end for end in (0, 1))
    codes = (before / step).round()
    assert ((codes == lower) | (codes == upper)).all()
    soft = rounding(before) / step
    # The nearest point to the float weight among all that is within one step of the code.
    wanted = torch.minimum(torch.maximum(weight / step, codes - 1), codes + 1)
    low, high = (end / step for end in ends_of(stub))
    wanted = torch.minimum(torch.maximum(wanted.double(), low), high)
    near = (wanted - codes).abs() < 0.999  # else it starts at the code itself or one beside it
    torch.testing.assert_close(soft[near].double(), wanted[near], atol=2e-4, rtol=0)
    assert ((soft - codes).abs() <= 1).all()


def test_weights_on_the_grid_can_still_learn() -> None:
    weight, stub = make(cut=3.0)
    on_grid = by_stub(weight, stub)
    rounding = SoftRound(on_grid, stub)
    assert torch.equal(rounding.hard(), on_grid)
    rounding(on_grid).sum().backward()
    assert (rounding.variable.grad != 0).all()


def test_half_precision_weights_keep_their_type() -> None:
    weight, stub = make("int8")
    assert SoftRound(weight.half(), stub)(weight.half()).dtype == torch.float16


def test_it_moves_with_the_model() -> None:
    rounding = SoftRound(*make())
    assert {t.device.type for t in rounding.to("meta").buffers()} == {"meta"}
    assert not SoftRound(*make()).state_dict().keys() - {"variable"}


def test_types_without_integer_codes_are_refused_by_name() -> None:
    book = codebook_type("powers", [0, 1, 2, 4, -1, -2, -4])
    for dtype in (quant_type("float8e4m3fn"), book):
        stub = Stub("layer.weight", QuantSpec(dtype=dtype))
        with pytest.raises(ConfigError, match=f"'layer.weight'.*{dtype}.*integer codes"):
            SoftRound(torch.zeros(3), stub)


def test_a_stub_without_scale_is_refused() -> None:
    with pytest.raises(NotCalibratedError, match="'w'"):
        SoftRound(torch.zeros(3), Stub("w", QuantSpec()))


def test_weights_that_hold_nan_are_refused() -> None:
    weight, stub = make()
    weight[0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="'w' holds NaN"):
        SoftRound(weight, stub)
