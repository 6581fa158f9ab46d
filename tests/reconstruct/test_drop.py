"""Quantization left out by chance."""

import pytest
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.numerics import QParams
from qwrap.quant.clamp import Clamp
from qwrap.quant.stubs import Stub
from qwrap.reconstruct.drop import Drop, kernels_beside
from qwrap.reconstruct.learned_scale import LearnedScale


def make_stub(scale=0.25):
    stub = Stub("t", QuantSpec(dtype=quant_type("uint4"), symmetric=False), training_by="lsq")
    stub.set_qparams(QParams(torch.tensor([scale]), torch.zeros(1, dtype=torch.int32)))
    stub.mode = "quantize"
    return stub


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def values(count=40_000):
    # Between the codes, so that what was rounded can be told.
    return torch.rand(count, generator=generator(9)) * 0.2 + 1.02


@pytest.mark.parametrize("probability", [0.25, 0.5, 0.9])
def test_each_element_stays_with_the_probability_given(probability) -> None:
    x, stub = values(), make_stub()
    y = Drop(stub, probability, generator())(x)
    kept = y == x
    assert torch.equal(y[~kept], stub(x)[~kept])
    deviation = (probability * (1 - probability) / len(x)) ** 0.5
    assert abs(float(kept.float().mean()) - probability) < 4 * deviation


def test_over_many_passes_the_mean_is_the_mixture() -> None:
    x, stub = values(50), make_stub()
    drop = Drop(stub, 0.5, generator())
    mean = torch.stack([drop(x) for _ in range(1500)]).mean(0)
    # Half of a step is the most that a pass can differ by; four deviations of the mean.
    torch.testing.assert_close(mean, (x + stub(x)) / 2, atol=4 * 0.0625 / 1500**0.5, rtol=0)


def test_all_or_nothing_stays_at_the_ends() -> None:
    x, stub = values(), make_stub()
    assert torch.equal(Drop(stub, 0.0, generator())(x), stub(x))
    assert torch.equal(Drop(stub, 1.0, generator())(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_infinity_stays_itself_where_it_is_kept_in_every_float_type(dtype) -> None:
    x = torch.full((999,), float("inf"), dtype=dtype)
    y = Drop(make_stub(), 0.5, generator())(x)
    assert y.dtype == dtype
    assert set(y.tolist()) == {float("inf"), 15 * 0.25}


def test_it_takes_any_layout_in_memory() -> None:
    x, stub = values(2 * 3 * 5 * 7).reshape(2, 3, 5, 7), make_stub()
    plain = Drop(stub, 0.5, generator())(x)
    moved = Drop(stub, 0.5, generator())(x.to(memory_format=torch.channels_last))
    assert torch.equal(moved, plain)


def test_inactive_it_is_its_tap() -> None:
    x, stub = values(), make_stub()
    drop, random = Drop(stub, 0.5, generator()), generator()
    drop.active = False
    assert torch.equal(drop(x), stub(x))
    assert torch.equal(drop.generator.get_state(), random.get_state())


def test_it_repeats_with_the_seed_and_leaves_the_global_generator_alone() -> None:
    x, stub = values(), make_stub()
    before = torch.get_rng_state()
    first, again = (Drop(stub, 0.5, generator(3))(x) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_pass_what_was_kept_and_what_was_rounded_within_the_range() -> None:
    x = torch.cat([values(1000), torch.full((1000,), 50.0)]).requires_grad_()
    learned = LearnedScale(make_stub())
    drop = Drop(learned, 0.5, generator())
    y = drop(x)
    y.sum().backward()
    kept = y == x
    inside = x < 4
    assert torch.equal(x.grad != 0, kept | inside)
    assert learned.gain.grad is not None
    assert float(learned.gain.grad) > 0  # what was rounded and cut off asks for a larger scale


def test_an_activation_function_that_the_stub_stands_in_for_runs_beside_it() -> None:
    stub, other = make_stub(), make_stub()
    kernels = {"relu": Clamp(stub, 0.0, float("inf")), "clip": Clamp(other, 0.0, 6.0), "x": abs}
    drop = Drop(LearnedScale(stub), 0.5, generator())
    assert set(kernels_beside(kernels, [drop])) == {"clip", "x"}
