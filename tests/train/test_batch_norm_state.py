"""What is saved, measured and restored of live batch normalizations."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from normed import (
    LIVE,
    batches,
    calibrated,
    conv_net,
    live,
    same_output,
    seeded,
    trained,
)
from torch import Tensor, nn

import qwrap
from qwrap.errors import ConfigError, InputError, QwrapWarning
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.quant.live import live_layers

# --- state ---------------------------------------------------------------------------------------


def test_a_state_dict_restores_everything(tmp_path: Path) -> None:
    net = seeded(conv_net)
    model, fresh = trained(calibrated(net)), live(net)
    qwrap.train.freeze_batch_norm(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.substitute("/c0").frozen
    assert same_output(model, fresh)
    qwrap.train.freeze_batch_norm(fresh, False)
    qwrap.train.freeze_batch_norm(model, False)
    assert same_output(model, fresh)


def test_a_state_dict_from_after_folding_folds_and_one_from_before_unfolds() -> None:
    net = seeded(conv_net)
    model = trained(calibrated(net))
    before = copy.deepcopy(model.state_dict())
    qwrap.train.fold_batch_norm(model, nodes="/c[01]")
    fresh = live(net)
    fresh.load_state_dict(model.state_dict())
    assert sorted(fresh.replaced) == ["/c2", "/c3", "/c4"]
    assert same_output(model, fresh)
    fresh.load_state_dict(before)
    assert sorted(fresh.replaced) == [f"/c{i}" for i in range(5)]
    assert same_output(fresh, model) is False
    other = live(net)
    other.load_state_dict(before)
    assert same_output(fresh, other)


def test_copies_and_pickles_go_on_alike() -> None:
    model = trained(calibrated(seeded(conv_net)))
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert same_output(copied, pickled)
    assert copied.substitute("/c0").gamma is not model.substitute("/c0").gamma


def test_preparing_again_keeps_normalizations_or_folds_them() -> None:
    model = trained(calibrated(seeded(conv_net)))
    layer, weight = model.substitute("/c0"), model.stored("layers.0.weight")
    deployed = {value: model.deployed(value) for value in model.remade}
    qwrap.prepare(model, qwrap.QConfig(**LIVE, weight="int4"))
    assert model.substitute("/c0") is layer
    assert model.stored("layers.0.weight") is weight
    assert all(torch.equal(model.deployed(v), tensor) for v, tensor in deployed.items())
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    assert not model.replaced
    assert all(torch.equal(model.stored(v), tensor) for v, tensor in deployed.items())


def test_other_algorithms_write_through_the_folding() -> None:
    model = trained(calibrated(seeded(conv_net), weight="int4"))
    folded = copy.deepcopy(model)
    qwrap.train.fold_batch_norm(folded)
    for change in (qwrap.round_weights, qwrap.correct_biases):
        assert change(model, batches(8, seed=6)) == change(folded, batches(8, seed=6))
        for value in folded.layout.slots:
            # What was divided by a factor is multiplied by it again.
            ours, theirs = model.deployed(value), folded.deployed(value)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=value)


# --- statistics ----------------------------------------------------------------------------------


def test_reestimation_gives_mean_and_variance_of_all_batches_together() -> None:
    model = trained(calibrated(seeded(conv_net)))
    data = [*batches(3, seed=4), *batches(2, (5, 3, 8, 8), seed=5)]
    layer, x = model.substitute("/c0"), torch.cat(data)
    factor = layer.factor().float().reshape(-1, 1, 1, 1)
    weight = model.tap(UsePoint("/c0", 1))(model.stored("layers.0.weight") * factor) / factor
    y = nn.functional.conv2d(model.tap(ValuePoint("x"))(x), weight, None, 1, 1).double()
    qwrap.train.reestimate_batch_norm(model, data, progress=False)
    # Means of float32 values.
    torch.testing.assert_close(layer.running_mean.double(), y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), y.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not layer.renewing
    assert layer.moments is None


def test_reestimating_in_a_loop_of_ones_own_works_inside_of_another_module() -> None:
    model = trained(calibrated(seeded(conv_net)))
    other, data = nn.Sequential(copy.deepcopy(model)), batches(3, seed=4)
    qwrap.train.reestimate_batch_norm(model, data, progress=False)
    with qwrap.train.reestimating_batch_norm(other):
        for x in data:
            other(x)
    assert same_output(model, other[0])


def enter_and_leave(model: nn.Module) -> None:
    with qwrap.train.reestimating_batch_norm(model):
        pass


def test_a_failed_reestimation_leaves_the_statistics() -> None:
    model = trained(calibrated(seeded(conv_net)))
    before = model.substitute("/c3").running_var.clone()
    with pytest.raises(InputError, match="no batch"):
        qwrap.train.reestimate_batch_norm(model, [], progress=False)
    with pytest.raises(InputError, match=r"'/c0'.* saw no data"):
        enter_and_leave(model)
    with pytest.raises(InputError, match="'x'"):
        qwrap.train.reestimate_batch_norm(model, [*batches(1), torch.zeros(3)], progress=False)
    assert torch.equal(model.substitute("/c3").running_var, before)
    assert not model.substitute("/c3").renewing


def test_the_verbs_say_where_nothing_is_live() -> None:
    model = live(seeded(conv_net), bn="fold")
    verbs = (
        qwrap.train.freeze_batch_norm,
        qwrap.train.sync_batch_norm,
        qwrap.train.fold_batch_norm,
    )
    for verb in verbs:
        assert verb(model) == 0
        with pytest.raises(ConfigError, match="no prepared model"):
            verb(nn.Linear(1, 1))
        with pytest.raises(ConfigError, match="'/c9'"):
            verb(model, nodes="/c9")
    with pytest.raises(ConfigError, match="bn='live'"):
        qwrap.train.reestimate_batch_norm(model, batches(1))


def test_some_layers_can_be_frozen() -> None:
    model = live(seeded(conv_net))
    assert qwrap.train.freeze_batch_norm(nn.Sequential(model), nodes="/c[13]") == 2
    assert [layer.frozen for _, layer in live_layers(model)] == [False, True, False, True, False]


def test_a_schedule_freezes_statistics_for_the_last_third() -> None:
    model = live(seeded(conv_net))
    schedule = qwrap.train.Schedule(model, 9, fake_quant=None)
    frozen = []
    for _ in range(9):
        frozen.append(model.substitute("/c0").frozen)
        schedule.step()
    assert frozen == [False] * 6 + [True] * 3


# --- models that came folded ---------------------------------------------------------------------

FOLDED = """
    a = Conv<pads=[1,0,2,1]>(x, w1) r = Relu(a)
    b = Conv<group=2>(r, w2, b2) s = Relu(b)
    c = Conv(s, w3, b3) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, w4, b4)
"""
SHAPES = {"w1": (6, 3, 3, 3), "w2": (6, 3, 1, 1), "b2": (6,), "w3": (8, 6, 3, 3), "b3": (8,)}
SHAPES |= {"w4": (8, 4), "b4": (4,)}


def came_folded(small, nodes: str = FOLDED, shapes=SHAPES, outputs="float[N,4] y"):
    model = qwrap.load(small.build(nodes, shapes, outputs=outputs)).eval()
    (x,) = batches(1, seed=8)
    wanted = model(x)
    qwrap.prepare(model, qwrap.QConfig(**LIVE))
    return model, x, wanted


def test_a_model_that_came_folded_gets_normalizations_that_change_nothing(small) -> None:
    model, x, wanted = came_folded(small)
    assert sorted(model.replaced) == ["/a", "/b", "/c"]
    assert torch.equal(model(x), wanted)
    seen: list[Tensor] = []
    with qwrap.calibrating(model), model.watching({"b": seen.append}), torch.no_grad():
        for batch in batches(3):
            model(batch)
    stub_modes(model, "float")
    # A mean is added to each bias and taken off again, in float32.
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    layer, y = model.substitute("/b"), torch.cat(seen).double()
    bias = torch.tensor(model.graph.values["b2"].const_value.numpy()).reshape(1, -1, 1, 1)
    mean, variance = (y - bias).mean((0, 2, 3)), y.var((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-5)
    for value in ("w1", "w2", "w3"):
        wanted = torch.tensor(model.graph.values[value].const_value.numpy())
        assert torch.equal(model.deployed(value), wanted)


def stub_modes(model: qwrap.WrappedModel, mode: str) -> None:
    for tap in (model.tap(point) for point in model.attached):
        tap.mode = mode


def test_what_came_folded_can_be_trained_exported_and_verified(small, tmp_path: Path) -> None:
    model, _, _ = came_folded(small)
    qwrap.calibrate(model, batches(3), progress=False)
    trained(model)
    qwrap.export(model, tmp_path / "live.onnx")
    report = qwrap.verify(model, tmp_path / "live.onnx", batches(2, seed=9), progress=False)
    assert report.deployed.differing == 0


def test_only_layers_with_another_one_behind_get_a_normalization_back(small) -> None:
    nodes = "a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) y = Sigmoid(c)"
    shapes = {"w1": (6, 3, 3, 3), "w2": (4, 6, 1, 1)}
    model, _, _ = came_folded(small, nodes, shapes, "float[N,M,H,W] y")
    assert sorted(model.replaced) == ["/a"]
    assert "/c" not in model.replaced


def test_a_weight_of_two_nodes_stays_folded_and_it_is_said(small) -> None:
    nodes = "a = Conv(x, w) r = Relu(a) b = Conv(r, w) c = Conv(b, u) y = GlobalAveragePool(c)"
    shapes = {"w": (3, 3, 3, 3), "u": (4, 3, 1, 1)}
    model, x, wanted = came_folded(small, nodes, shapes, "float[N,M,H,W] y")
    assert not model.replaced
    assert "Conv '/a': stays without batch normalization: its weight 'w'" in model.plan.summary()
    assert torch.equal(model(x), wanted)


def test_layers_without_statistics_are_named_and_get_them_later(small, tmp_path: Path) -> None:
    model, x, _ = came_folded(small)
    file = tmp_path / "statistics.safetensors"
    qwrap.calibrate(model, batches(3), save=file, progress=False)
    model, x, _ = came_folded(small)
    with pytest.warns(QwrapWarning, match="3 layers have no statistics.*'/a', '/b', '/c'"):
        qwrap.calibrate(model, [], statistics=file, progress=False)
    before = model(x)
    assert torch.equal(model.train()(x), before)
    model(x).sum().backward()
    assert not model.substitute("/a").gamma.grad.any()
    qwrap.train.reestimate_batch_norm(model, batches(3), progress=False)
    assert model.substitute("/a").known
    # A bias may move to the next of its codes, which are steps of a hundred thousandth.
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=1e-2)
