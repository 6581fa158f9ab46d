"""Scales of activations that are learned: against the formulas, and what they may not do."""

import copy

import pytest
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.errors import NotCalibratedError
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.clamp import Clamp
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.learned_scale import LearnedScale

SHAPE = (4, 6, 5)


def make(kind="uint4", training_by="lsq", axis=None, limit=float("inf"), **spec):
    made = QuantSpec(dtype=quant_type(kind), symmetric=False, axis=axis, **spec)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    ends = torch.rand(1 if axis is None else SHAPE[axis], generator=generator) + 0.5
    stub = Stub("t", made, ends.shape, training_by=training_by)
    stub.set_qparams(choose_qparams(-ends, 1.3 * ends, made), limit)
    stub.mode = "quantize"
    return x, stub, torch.randn(SHAPE, generator=generator)


def test_at_first_it_rounds_as_the_stub_does() -> None:
    for kind in ("uint8", "int8", "uint4", "uint16", "float8e4m3fn"):
        x, stub, _ = make(kind)
        assert torch.equal(LearnedScale(stub)(x), stub(x))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", ["uint4", "int4", "uint8"])
def test_its_gradient_is_that_of_learned_step_size_quantization(kind, axis) -> None:
    x, stub, upstream = make(kind, axis=axis)
    learned = LearnedScale(stub)
    x.requires_grad_()
    (learned(x) * upstream).sum().backward()
    shape = [1, -1, 1]
    scale, zero = stub.scale.double().reshape(shape), stub.zero_point.double().reshape(shape)
    t, g = x.detach().double() / scale, upstream.double()
    low, high = stub.grid.qmin - zero, stub.grid.qmax - zero
    codes = t.round()
    inside = (codes >= low) & (codes <= high)
    slope = torch.where(inside, codes - t, torch.where(codes < low, low, high))
    count = SHAPE[1] * SHAPE[2] if axis is None else SHAPE[2]  # features of one sample
    reach = torch.maximum(-low, high)
    factor = 1 / (count * reach).sqrt() / scale  # the step is relative to the scale
    axes = (0, 1, 2) if axis is None else (0, 2)
    wanted = (slope * g).sum(axes, keepdim=True) * factor
    # Each rounding error is kept to the nearest 1/252.
    torch.testing.assert_close(learned.gain.grad.double(), wanted.flatten(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad, upstream * inside, rtol=0, atol=0)


def test_learning_finds_the_scale_with_the_least_error() -> None:
    x, stub, _ = make("uint4")
    x = x.repeat(20, 1, 1) + 0.05 * torch.randn(
        80, 6, 5, generator=torch.Generator().manual_seed(1)
    )
    learned = LearnedScale(stub)
    candidates = stub.scale * torch.linspace(0.5, 2.5, 201)

    def error(scale):
        trial = copy.deepcopy(stub)
        trial.set_qparams(QParams(scale.reshape(1), stub.zero_point))
        return float((trial(x) - x).detach().square().mean())

    best = min(map(error, candidates))
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (learned(x) - x).square().mean().backward()
        optimizer.step()
    start = error(stub.scale)
    assert start > 1.2 * best
    assert error(learned.scale) < best + 0.05 * (start - best)  # the gradient is an estimate


def test_only_finishing_changes_the_stub_and_the_result_stays_the_same() -> None:
    x, stub, _ = make("uint8", axis=1)
    learned, before = LearnedScale(stub), stub.scale.clone()
    with torch.no_grad():
        learned.gain.uniform_(-0.3, 0.3)
    wanted = learned(x)
    assert torch.equal(stub.scale, before)
    learned.finish()
    assert torch.equal(stub(x), wanted)
    assert not torch.equal(stub.scale, before)


def test_unmoved_it_finishes_bit_for_bit_as_it_began() -> None:
    _, stub, _ = make("uint8", limit=3.0)
    before = {
        name: value.clone() for name, value in stub.state_dict().items() if "extra" not in name
    }
    LearnedScale(stub).finish()
    for name, value in before.items():
        assert torch.equal(stub.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["uint8", "float8e4m3fn"])
def test_a_fixed_scale_has_nothing_to_learn(kind) -> None:
    x, stub, upstream = make(kind, training_by="fixed")
    learned = LearnedScale(stub)
    assert not [*learned.parameters()]
    x.requires_grad_()
    (learned(x) * upstream).sum().backward()
    assert x.grad is not None
    learned.finish()
    assert torch.equal(stub.scale, learned.scale)


def test_powers_of_two_stay_so() -> None:
    x, stub, _ = make("int8", training_by="tqt", power_of_two=True)
    learned = LearnedScale(stub)
    assert torch.equal(learned(x), stub(x))
    with torch.no_grad():
        learned.gain.add_(1.2)
    assert torch.equal(learned.scale, 2 * stub.scale)  # two octaves up from half of one below


def test_scales_are_rounded_as_they_are_stored() -> None:
    _, stub, _ = make("uint8", scale_type="float16")
    learned = LearnedScale(stub)
    with torch.no_grad():
        learned.gain.add_(0.1234)
    assert torch.equal(learned.scale, learned.scale.half().float())


def test_the_largest_scale_of_the_stub_holds_and_the_clamp_stays_redundant() -> None:
    spec = QuantSpec(dtype=quant_type("uint8"), symmetric=False)
    stub = Stub("t", spec, training_by="lsq")
    scale = torch.tensor([6 / 255])
    stub.set_qparams(QParams(scale, torch.zeros(1, dtype=torch.int32)), limit=float(scale))
    stub.mode = "quantize"
    clip, learned = Clamp(stub, 0.0, 6.0), LearnedScale(stub)
    x = torch.linspace(-2, 9, 500)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (-learned(clip(x)).sum()).backward()  # asks for a larger scale
        optimizer.step()
    assert clip.is_redundant()
    assert float(learned(clip(x)).detach().max()) <= 6.0
    learned.finish()
    assert torch.equal(stub.scale, scale)
    assert torch.equal(stub.scale_limit, scale)
    assert clip.is_redundant()


def test_the_smallest_scale_asked_for_holds() -> None:
    x, stub, _ = make("uint8")
    least = 0.9 * float(stub.scale)
    learned = LearnedScale(stub, least)
    optimizer = torch.optim.SGD(learned.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        learned(x).square().sum().backward()  # asks for a smaller scale
        optimizer.step()
    assert float(learned.scale) == pytest.approx(least)
    learned(x).square().sum().neg().backward()
    assert learned.gain.grad is not None  # and it can come back


def test_a_stub_that_passes_on_passes_on() -> None:
    x, stub, _ = make()
    learned = LearnedScale(stub)
    stub.mode = "float"
    assert torch.equal(learned(x), x)


def test_a_stub_without_scale_is_refused() -> None:
    with pytest.raises(NotCalibratedError, match="'t'"):
        LearnedScale(Stub("t", QuantSpec()))
