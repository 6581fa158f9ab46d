"""Figures of a training against figures computed beside it."""

import numpy as np
import pytest
import torch
from torch import nn

import qwrap
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError
from qwrap.numerics import quantize
from qwrap.quant.prepare import stubs
from qwrap.train import Monitor, statistics, statistics_table


@pytest.fixture
def make(small):
    def make(training="lsq+", source=None, **settings):
        model = qwrap.load(source or small.convs())
        config = qwrap.QConfig(scope="kernels", training=training, **settings)
        if settings.get("activation", "uint8") is not None:
            config.set("x", training=training)  # inputs are learned when asked for
        qwrap.prepare(model, config)
        qwrap.calibrate(model, small.batches(), progress=False)
        return model.train()

    return make


def found(model):
    return {stub.name: stub for _, stub in stubs(model)}


def backward(model, x):
    model.zero_grad()
    model(torch.from_numpy(x)).square().mean().backward()


def test_scales_and_zero_points_are_those_of_the_tensors(make) -> None:
    model = make()
    got, known = statistics(model), found(model)
    assert got["scale/x"] == float(known["x"].scale)
    assert got["zero_point/x"] == float(known["x"].zero_point)
    scales = known["w1"].scale.double()
    assert got["scale_min/w1"] == float(scales.min())
    assert got["scale_max/w1"] == float(scales.max())
    assert got["scale/w1"] == pytest.approx(float(scales.mean()), rel=1e-6)
    assert "zero_point/w1" not in got
    assert {key.partition("/")[2] for key in got} == {"x", "b", "y", "w1", "w2"}


def test_gradients_are_norms_of_the_last_backward_pass(make, small) -> None:
    model = make("lsq+")
    assert not [key for key in statistics(model) if key.startswith("gradient")]
    backward(model, small.batches()[0])
    got, known, weight = statistics(model), found(model), model.stored("w1")
    gain = known["w1"].get_parameter("gain").grad
    assert got["gradient_weight/w1"] == pytest.approx(float(weight.grad.norm()), rel=1e-6)
    assert got["gradient_scale/w1"] == pytest.approx(float(gain.norm()), rel=1e-6)
    ratio = gain.norm() / (weight.grad.norm() / weight.detach().norm())
    assert got["gradient_ratio/w1"] == pytest.approx(float(ratio), rel=1e-6)
    assert "gradient_zero_point/x" in got
    assert "gradient_weight/x" not in got


def test_the_clip_of_pact_is_among_them(make, small) -> None:
    model = make("pact")
    backward(model, small.batches()[0])
    assert "gradient_clip/x" in statistics(model)


def test_clipped_shares_are_those_of_values_beyond_the_codes(make, small) -> None:
    model = make()
    known, x = found(model)["x"], [3 * batch for batch in small.batches(2)]
    values = np.concatenate([batch.reshape(-1) for batch in x]).astype(np.float64)
    codes = np.rint(values / float(known.scale)) + int(known.zero_point)
    with Monitor(model) as monitor:
        for batch in x:
            model(torch.from_numpy(batch))
    got = monitor.statistics()
    assert got["clipped_below/x"] == float((codes < 0).mean()) > 0
    assert got["clipped_above/x"] == float((codes > 255).mean()) > 0
    # a Relu's: what it cuts off is not clipped
    assert got["clipped_below/b"] == 0
    assert got["clipped_above/b"] > 0


@pytest.mark.parametrize("weight", ["int2", "float8e4m3fn", QuantSpec(dtype="int4", block_size=2)])
def test_clipped_shares_of_weights_of_any_type(make, small, weight) -> None:
    model = make("lsq", activation=None, weight=weight)
    stub, values = found(model)["w2"], model.stored("w2")
    with torch.no_grad():
        values.mul_(1.5)
    with Monitor(model) as monitor:
        model(torch.from_numpy(small.batches()[0]))
    got = monitor.statistics()
    with torch.no_grad():
        clipped = stub(values.detach())
    beyond = (clipped - values).abs() > stub.scale.max() / 2
    least = float(beyond.float().mean())
    if stub.spec.dtype.is_integer:
        assert got["clipped_below/w2"] + got["clipped_above/w2"] == pytest.approx(least, abs=0.1)
    assert got["clipped_below/w2"] + got["clipped_above/w2"] > 0


def test_nothing_is_counted_outside_of_the_block_and_it_starts_from_zero(make, small) -> None:
    model, x = make(), torch.from_numpy(small.batches()[0])
    monitor = Monitor(model)
    model(1000 * x)
    assert not [key for key in monitor.statistics() if key.startswith("clipped")]
    with monitor:
        model(1000 * x)
    assert monitor.statistics()["clipped_above/x"] > 0.4
    with monitor:
        model(x / 1000)
    assert monitor.statistics()["clipped_above/x"] == 0
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_failing_step_leaves_no_hook(make) -> None:
    model = make()

    def step():
        with Monitor(model):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("weight", ["int8", "int4", "uint16", "float8e4m3fn"])
def test_changed_codes_are_counted_from_look_to_look(make, weight) -> None:
    model = make("lsq", activation="uint8", weight=weight)
    monitor, stub, values = Monitor(model), found(model)["w1"], model.stored("w1")
    before = quantize(values.detach(), stub.qparams, stub.grid).float()
    with torch.no_grad():
        values.mul_(0.9)
    after = quantize(values.detach(), stub.qparams, stub.grid).float()
    got = monitor.statistics()
    assert got["codes_changed/w1"] == pytest.approx(float((after != before).float().mean()))
    assert got["codes_changed/w1"] > 0.1
    assert got["codes_changed/w2"] == 0
    assert monitor.statistics()["codes_changed/w1"] == 0


def test_several_models_are_told_apart(make) -> None:
    user = nn.ModuleDict({"a": make(), "b": make()})
    assert {"scale/a.x", "scale/b.x"} <= set(statistics(user))
    assert "scale/x" in statistics(nn.ModuleDict({"a": make()}))


def test_a_model_that_is_not_calibrated_has_no_codes_to_look_at(small) -> None:
    model = qwrap.load(small.convs())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    got = Monitor(model).statistics()
    assert np.isnan(got["scale/x"])
    assert not [key for key in got if key.startswith("codes")]


def test_the_table_has_a_row_for_each_tensor_and_every_figure(make) -> None:
    lines = statistics_table({"scale/x": 0.5, "zero_point/x": 3.0, "scale/" + "y" * 60: 2.0})
    rows = [line.split() for line in lines.splitlines()]
    assert rows[0] == ["tensor", "scale", "zero_point"]
    assert rows[1] == ["x", "0.5", "3"]
    assert rows[2] == ["…" + 39 * "y", "2"]
    assert len(statistics_table(statistics(make())).splitlines()) == 6


def test_without_a_prepared_model_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no prepared model"):
        statistics(nn.Linear(1, 1))
