"""Learned rounding by division, against the formulas of the paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwrap.config import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.errors import ConfigError
from qwrap.numerics import choose_qparams, fake_quantize, scale_shape, spread
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.flex_round import FlexRound

SHAPE = (6, 5, 10)
LAYOUTS = {"tensor": (None, None), "channel": (0, None), "blocks": (1, 2)}


def make(kind="int4", layout="channel", seed=0, training_by="lsq", **spec):
    """A stub whose range cuts off some of the weights, and these."""
    axis, block_size = LAYOUTS[layout]
    spec.setdefault("symmetric", False)
    made = QuantSpec(dtype=quant_type(kind), axis=axis, block_size=block_size, **spec)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator)
    ends = 0.9 + torch.rand(scale_shape(SHAPE, made), generator=generator)
    stub = Stub("w", made, ends.shape, stored=True, training_by=training_by)
    stub.set_qparams(choose_qparams(-ends, 1.3 * ends, made))
    stub.mode = "quantize"
    return weight, stub


def by_stub(x, stub):
    return fake_quantize(x, stub.scale, stub.zero_point, stub.grid)


def move(rounding, by=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["int2", "int4", "uint4", "int8", "uint8"])
def test_it_starts_at_nearest(kind, layout) -> None:
    weight, stub = make(kind, layout)
    rounding = FlexRound(weight, stub, output_axis=0, input_axis=1)
    assert torch.equal(rounding(weight), by_stub(weight, stub))
    assert torch.equal(rounding.hard(), by_stub(weight, stub))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["int2", "int3", "int4", "uint4", "int8", "uint8"]),
    layout=st.sampled_from(list(LAYOUTS)),
    spec=st.sampled_from([{}, {"symmetric": True}, {"scale_type": "float16"}]),
    seed=st.integers(0, 2**20),
)
def test_finished_it_is_a_fixed_point_of_the_stub(kind, layout, spec, seed) -> None:
    weight, stub = make(kind, layout, seed, **spec)
    rounding = FlexRound(weight, stub, output_axis=0, input_axis=1)
    move(rounding, seed=seed)
    soft = rounding(weight)
    before = stub.scale.clone()
    hard = rounding.hard()
    assert torch.equal(stub.scale, before)
    assert torch.equal(rounding.finish(), hard)
    assert torch.equal(soft, hard)
    assert torch.equal(by_stub(hard, stub), hard)
    assert not torch.equal(stub.scale, before)


def test_the_formula_is_the_papers() -> None:
    weight, stub = make()
    rounding = FlexRound(weight, stub, output_axis=0, input_axis=1)
    move(rounding)
    s1 = (stub.scale * rounding.scaling.gain.exp()).reshape(-1, 1, 1)
    divisor = s1 * rounding.by_element.exp() * rounding.by_output.exp() * rounding.by_input.exp()
    zero = stub.zero_point.reshape(-1, 1, 1)
    codes = (torch.round(weight / divisor) + zero).clamp(-8, 7) - zero
    steps = (rounding.hard() - s1 * codes).abs() / s1
    # Nothing but ties that the order of the divisions decides may differ.
    assert (steps < 1e-5).float().mean() > 0.99


def test_the_divisors_get_the_gradient_of_the_paper() -> None:
    weight, stub = make()
    rounding = FlexRound(weight, stub, output_axis=0, input_axis=1)
    move(rounding, 0.1)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    (rounding(weight) * upstream).sum().backward()
    logarithm = rounding.by_element + rounding.by_output + rounding.by_input
    divided = (weight * torch.exp(-logarithm)).detach()
    scale, zero = rounding.scaling.scale.reshape(-1, 1, 1), stub.zero_point.reshape(-1, 1, 1)
    codes = (divided / scale).round() + zero
    inside = (codes >= -8) & (codes <= 7)
    assert 0 < inside.sum() < inside.numel()
    # d/dS2 of s1 * round(W / (s1 S2 ...)) is -W / (S2^2 ...) straight through; by log S2, times S2.
    wanted = -upstream * divided * inside
    torch.testing.assert_close(rounding.by_element.grad, wanted)
    torch.testing.assert_close(rounding.by_output.grad, wanted.sum((1, 2), keepdim=True))
    torch.testing.assert_close(rounding.by_input.grad, wanted.sum((0, 2), keepdim=True))


def test_the_scale_gets_the_gradient_of_learned_step_size_quantization() -> None:
    weight, stub = make()
    rounding = FlexRound(weight, stub)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    (rounding(weight) * upstream).sum().backward()
    scale, zero = stub.scale.reshape(-1, 1, 1), stub.zero_point.reshape(-1, 1, 1)
    t = (weight / scale).double()
    codes = (t.round() + zero).clamp(-8, 7) - zero
    inside = codes == t.round()
    slope = torch.where(inside, codes - t, codes) * upstream
    reach = torch.maximum(7 - stub.zero_point, stub.zero_point + 8)
    wanted = slope.sum((1, 2)) / (50 * reach).sqrt() / stub.scale
    # Sums of float32 numbers.
    torch.testing.assert_close(rounding.scaling.gain.grad, wanted.float(), rtol=1e-5, atol=1e-6)


def test_large_weights_can_cross_several_codes_and_zero_never_moves() -> None:
    weight, stub = make("int8")
    weight[0] = 0.0
    rounding = FlexRound(weight, stub)
    before = rounding.hard()
    with torch.no_grad():
        rounding.by_element.fill_(0.1)
    after = rounding.hard()
    moved = ((before - after) / spread(stub.scale, SHAPE, stub.spec)).round().abs()
    assert moved.max() > 2
    assert not moved[0].any()


def test_a_dictated_scale_stays_while_the_divisors_learn() -> None:
    weight, stub = make(training_by="fixed")
    rounding = FlexRound(weight, stub, output_axis=0)
    assert {name for name, _ in rounding.named_parameters()} == {"by_element", "by_output"}
    before = stub.scale.clone()
    rounding(weight).sum().backward()
    assert rounding.by_element.grad.any()
    move(rounding)
    hard = rounding.finish()
    assert torch.equal(stub.scale, before)
    assert torch.equal(by_stub(hard, stub), hard)


def test_a_channel_alone_has_no_divisor_of_its_own() -> None:
    weight, stub = make("int8", "tensor")
    rounding = FlexRound(weight[:, :1], stub, output_axis=0, input_axis=1)
    assert rounding.by_input is None
    assert rounding.by_output.shape == (6, 1, 1)


def test_the_scale_leaves_room_for_the_biases() -> None:
    weight, stub = make()
    least = 0.8 * stub.scale
    rounding = FlexRound(weight, stub, least=least)
    with torch.no_grad():
        rounding.scaling.gain.fill_(-3.0)
    rounding.finish()
    assert torch.equal(stub.scale, least)


def test_it_has_no_regularizer() -> None:
    rounding = FlexRound(*make())
    nothing = rounding.regularizer(2.0)
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert all(parameter.grad is None for parameter in rounding.parameters())


def test_types_without_integer_codes_are_refused_by_name() -> None:
    stub = Stub("layer.weight", QuantSpec(dtype=quant_type("float8e4m3fn")))
    with pytest.raises(ConfigError, match=r"'layer.weight'.*integer codes"):
        FlexRound(torch.zeros(3), stub)
