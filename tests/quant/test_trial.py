"""A change is kept if held-back batches come closer to float; else the model is as it was."""

import copy

import numpy as np
import pytest
import torch

import qwrap
from qwrap.errors import InputError, NotCalibratedError
from qwrap.graph.index import OnnxGraph
from qwrap.model.materialize import materialize
from qwrap.model.points import ValuePoint
from qwrap.quant.prepare import set_mode
from qwrap.quant.trial import attempt, split


def calibrated(small, **settings):
    batches = small.batches(4)
    model = qwrap.load(small.convs())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", **settings))
    qwrap.calibrate(model, batches, progress=False)
    return model, batches


def everything(model):
    """All that a model computes with, and what is known of it."""
    plan = copy.deepcopy(model.plan.to_dict())
    plan.pop("outcomes")
    state = model.state_dict()
    tensors = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return plan, tensors, {k: v for k, v in state.items() if k not in tensors}, list(model.attached)


def assert_same(some, others) -> None:
    assert some[0] == others[0]
    assert some[1].keys() == others[1].keys()
    for key, tensor in some[1].items():
        assert torch.equal(tensor, others[1][key]), key
    assert repr(some[2]) == repr(others[2])
    assert some[3] == others[3]


def spoil(model) -> None:
    with torch.no_grad():
        model.stored("w1").mul_(-1)


def calibrate_on_other_data(model, _small) -> None:
    qwrap.calibrate(model, [np.full((2, 3, 16, 16), 50.0, np.float32)], progress=False)
    spoil(model)


def rewrite_the_graph(model, small) -> None:
    draft = materialize(model, lasting=True)
    config = model.config
    model.rewrite(OnnxGraph(draft, model.graph.source), ())
    qwrap.prepare(model, config)
    calibrate_on_other_data(model, small)


def place_elsewhere(model, small) -> None:
    qwrap.prepare(model, qwrap.QConfig(scope="kernels", per_channel=False))
    calibrate_on_other_data(model, small)


@pytest.mark.parametrize(
    "change",
    [calibrate_on_other_data, rewrite_the_graph, place_elsewhere],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("settings", [{}, {"training": "lsq"}, {"method": "auto"}], ids=str)
def test_what_does_not_help_leaves_no_trace(small, change, settings) -> None:
    model, batches = calibrated(small, **settings)
    x = torch.from_numpy(batches[0])
    before, output, plan = everything(model), model(x), model.plan
    parameters = dict(model.named_parameters())
    outcome = attempt(model, "spoiling", split(model, batches)[1], lambda: change(model, small))
    assert not outcome
    assert outcome.after > outcome.before > 0
    assert_same(everything(model), before)
    assert torch.equal(model(x), output)
    assert model.plan is plan
    assert all(model.get_parameter(key) is value for key, value in parameters.items())
    assert "undone:    spoiling" in plan.summary()


def test_a_change_that_raises_leaves_no_trace(small) -> None:
    model, batches = calibrated(small)
    before = everything(model)

    def change() -> None:
        rewrite_the_graph(model, small)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(model, "spoiling", split(model, batches)[1], change)
    assert_same(everything(model), before)
    assert model.plan.outcomes == []


def test_what_helps_stays(small) -> None:
    model, batches = calibrated(small)
    spoiled = copy.deepcopy(model)
    spoil(spoiled)

    def mend() -> list[str]:
        spoil(spoiled)
        return ["one weight"]

    outcome = attempt(spoiled, "mending", split(spoiled, batches)[1], mend)
    assert outcome.kept
    assert outcome.details == ("one weight",)
    assert_same(everything(spoiled), everything(model))
    assert "kept:      mending, held-back error" in spoiled.plan.summary()
    assert spoiled.plan.to_dict()["outcomes"][0]["kept"] is True


def test_the_least_gain_is_a_share_of_the_error(small) -> None:
    model, batches = calibrated(small)
    spoil(model)
    deciding = split(model, batches)[1]
    gain = attempt(model, "mending", deciding, lambda: spoil(model))
    share = 1 - gain.after / gain.before
    for least, kept in ((share * 0.999, True), (share * 1.001, False)):
        spoil(model)
        assert (
            attempt(model, "mending", deciding, lambda: spoil(model), least_gain=least).kept == kept
        )


def test_modes_and_random_numbers_are_put_back(small) -> None:
    model, batches = calibrated(small)
    model.train()
    model.tap(ValuePoint("x")).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)

    def change() -> None:
        assert not any(module.training for module in model.modules())
        torch.rand(5)

    attempt(model, "drawing", split(model, batches)[1], change)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.rand(3), wanted)


def test_a_model_without_error_is_left_alone(small) -> None:
    model, batches = calibrated(small)
    set_mode(model, "float")
    outcome = attempt(model, "spoiling", split(model, batches)[1], lambda: spoil(model))
    assert not outcome
    assert outcome.details == ("nothing to gain",)


def test_every_other_batch_decides(small) -> None:
    model, batches = calibrated(small)
    teaching, deciding = split(model, batches)
    for i, given in enumerate(batches):
        (seen,) = (teaching, deciding)[i % 2][i // 2].values()
        np.testing.assert_array_equal(seen.numpy(), given)
    alone = split(model, batches[:1])
    assert torch.equal(*[next(iter(half[0].values())) for half in alone])
    with pytest.raises(InputError, match="no batches"):
        split(model, [])


def test_a_model_without_scales_is_refused(small) -> None:
    model = qwrap.load(small.convs())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match="no scale yet"):
        attempt(model, "anything", split(model, small.batches(2))[1], lambda: None)
