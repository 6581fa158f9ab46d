"""Refined ranges of activations against those found by computing with every candidate."""

import numpy as np
import pytest
import torch

import qwrap
from qwrap.algorithms.clipping import BOTH, EACH, clip_activations
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.model.points import ValuePoint
from qwrap.numerics import choose_qparams, fake_quantize
from qwrap.quant.scales import span_of


def calibrated(source, batches, **settings):
    config = qwrap.QConfig(**{"scope": "kernels", "method": "minmax", **settings})
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    return model


def widen(model, *names, by=1.9):
    """Let the codes of tensors reach further than the tensors do."""
    for name in names:
        model.tap(ValuePoint(name)).initial_scale.mul_(by)


def span(model, name):
    stub = model.tap(ValuePoint(name))
    return span_of(stub.qparams, stub.spec)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}


def test_the_range_is_the_best_behind_its_reader(small) -> None:
    source = small.build("y = Conv(x, w)", {"w": (4, 3, 3, 3)})
    batches = small.batches(1)
    model = calibrated(source, batches)
    widen(model, "x")
    stub, before = model.tap(ValuePoint("x")), span(model, "x")
    spans = [before, *((before[0] * r, before[1] * r) for r in BOTH)]
    spans += [(before[0] * r, before[1]) for r in EACH] + [(before[0], before[1] * r) for r in EACH]
    x, weight = torch.from_numpy(batches[0]), model.stored("w").detach()
    errors = []
    for low, high in spans:
        q = choose_qparams(torch.tensor(low), torch.tensor(high), stub.spec)
        rounded = fake_quantize(x, q.scale, q.zero_point, stub.spec)
        errors.append(float(torch.conv2d(rounded - x, weight).square().sum()))
    best = spans[int(np.argmin(errors))]
    assert clip_activations(model, batches, progress=False)
    # The zero point is an integer, so that the ends move by up to half a step each.
    step = float(stub.scale)
    assert np.allclose(span(model, "x"), best, rtol=0, atol=step)
    assert best != before


def test_ranges_that_are_too_wide_shrink_and_the_file_has_them(small, tmp_path) -> None:
    source, batches = small.convs(), small.batches(4)
    model = calibrated(source, batches)
    widen(model, "x", "b", by=3.0)
    outcome = clip_activations(model, batches, progress=False)
    assert outcome
    assert outcome.after < 0.7 * outcome.before
    qwrap.export(model, tmp_path / "q.onnx")
    report = qwrap.verify(model, tmp_path / "q.onnx", batches, progress=False)
    assert report.deployed.differing == 0


def test_tensors_that_share_a_scale_keep_sharing_it(small) -> None:
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, v) b = Conv<pads=[1,1,1,1]>(x, w) "
        "c = Concat<axis=1>(a, b) y = Conv(c, u)"
    )
    weights = {"v": (3, 3, 3, 3), "w": (3, 3, 3, 3), "u": (2, 6, 3, 3)}
    batches = small.batches(4)
    model = calibrated(small.build(nodes, weights), batches)
    names = ("a", "b", "c")
    assert len({span(model, name) for name in names}) == 1
    widen(model, *names)
    before = span(model, "c")
    assert clip_activations(model, batches, progress=False)
    assert len({span(model, name) for name in names}) == 1
    assert span(model, "c")[1] < before[1]


def test_no_code_comes_to_lie_beyond_an_absorbed_clip(small) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, v) b = Clip(a, zero, one) y = Conv(b, w)"
    weights = {"v": (3, 3, 3, 3), "w": (2, 3, 3, 3), "zero": np.float32(0), "one": np.float32(1)}
    batches = small.batches(4)
    model = calibrated(small.build(nodes, weights), batches)
    widen(model, "x")
    assert clip_activations(model, batches, progress=False)
    assert span(model, "b")[0] >= 0
    assert span(model, "b")[1] <= 1 + 1e-6


def test_scales_that_are_dictated_stay(small) -> None:
    nodes = "a = Conv<pads=[1,1,1,1]>(x, v) s = Softmax(a) b = Conv(s, w) y = Relu(b)"
    weights = {"v": (3, 3, 3, 3), "w": (2, 3, 3, 3)}
    batches = small.batches(4)
    config = qwrap.QConfig(scope="kernels", method="minmax")
    config.set("a", low=-9.0, high=9.0)
    config.exclude("/s")
    model = qwrap.load(small.build(nodes, weights)).eval()
    qwrap.prepare(model, config)
    qwrap.calibrate(model, batches, progress=False)
    found = {name: span(model, name) for name in ("a", "s") if name in model.plan.tensors}
    widen(model, "x")
    outcome = clip_activations(model, batches, progress=False)
    assert outcome
    assert {name: span(model, name) for name in found} == found


def test_what_does_not_help_is_taken_back_bit_for_bit(small) -> None:
    """The first batch is small, the second one fills the range."""
    source = small.build("y = Conv(x, w)", {"w": (4, 3, 3, 3)})
    large = small.batches(1)[0]
    batches = [large * np.float32(0.1), large]
    model = calibrated(source, batches)
    model.train()
    before, random = state(model), torch.random.get_rng_state()
    outcome = clip_activations(model, batches, progress=False)
    assert not outcome
    assert outcome.after > outcome.before
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert clip_activations(model, batches[:1], progress=False), "the first alone keeps it"


def test_sixteen_bits_have_room_for_all(small) -> None:
    batches = small.batches(2)
    model = calibrated(small.convs(), batches, activation="uint16")
    before = state(model)
    outcome = clip_activations(model, batches, progress=False)
    assert not outcome
    assert outcome.details[-1].endswith("activations are fixed or of another kind")
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_it_refuses_what_it_cannot_work_with(small) -> None:
    batches = small.batches()
    with pytest.raises(InputError, match="no batches"):
        clip_activations(calibrated(small.convs(), batches), [])
    bare = qwrap.load(small.convs()).eval()
    with pytest.raises(ConfigError, match="not prepared"):
        clip_activations(bare, batches)
    qwrap.prepare(bare, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match="no scale yet"):
        clip_activations(bare, batches)


def test_a_network_whose_ranges_are_too_wide_gets_better(shared_model) -> None:
    model, batches = shared_model("resnet20_cifar10", 8)
    sources = [key for key, plan in model.plan.sources().items() if plan.is_observed]
    widen(model, *sources[::4], by=4.0)
    outcome = clip_activations(model, batches, progress=False)
    assert outcome
    assert outcome.after < 0.8 * outcome.before
