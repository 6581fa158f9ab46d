"""Cross-layer equalization."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from shared_models import SharedModels, default_folder

import qwrap
from qwrap.algorithms.equalization import equalize
from qwrap.errors import ConfigError, InputError
from qwrap.model.batches import iterate
from qwrap.quant.auto.held_out import HeldOut, float_model

PAIR = "h = Conv(x, w, b) r = Relu(h) y = Conv(r, v, c)"
PAIR_WEIGHTS = {"w": (6, 3, 3, 3), "b": (6,), "v": (4, 6, 1, 1), "c": (4,)}
TRIPLE = "h = Conv(x, w, b) r = Relu(h) k = Conv<group=6>(r, d, e) s = Relu(k) y = Conv(s, v)"
TRIPLE_WEIGHTS = {"w": (6, 3, 3, 3), "b": (6,), "d": (6, 1, 3, 3), "e": (6,), "v": (4, 6, 1, 1)}
RANGES = {"balance": "ranges", "progress": False, "tolerance": 1e-6}


def prepared(source: Any, config: qwrap.QConfig | None = None) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config or qwrap.QConfig(scope="kernels"))
    return model


def calibrated(
    source: Any, batches: Any, config: qwrap.QConfig | None = None
) -> qwrap.WrappedModel:
    model = prepared(source, config)
    qwrap.calibrate(model, batches, progress=False)
    return model


def arrays(model: qwrap.WrappedModel) -> dict[str, np.ndarray]:
    """Weights by name, as they are in the module."""
    keys = {name: key for key, name in model.tensor_names.items()}
    state = model.state_dict()
    return {name: state[key].numpy().copy() for name, key in keys.items()}


def size(weight: np.ndarray, axis: int) -> np.ndarray:
    found: np.ndarray = np.abs(weight).max(tuple(i for i in range(weight.ndim) if i != axis))
    return found


def imbalanced(model: onnx.ModelProto, first: str, second: str, spread: float) -> onnx.ModelProto:
    """The same function, with channels of the tensor between two layers spread over a factor."""
    tensors = {t.name: t for t in model.graph.initializer}
    count = tensors[first].dims[0]
    factor = np.geomspace(1, spread, count).astype(np.float32)
    for name, by in ((first, factor), (first.replace("w", "b"), factor), (second, 1 / factor)):
        array = numpy_helper.to_array(tensors[name])
        axis = 1 if name == second and array.shape[1] == count else 0
        shape = [1] * array.ndim
        shape[axis] = -1
        tensors[name].CopyFrom(numpy_helper.from_array(array * by.reshape(shape), name))
    return model


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), after[key].nan_to_num()), key


def test_a_pair_gets_the_factors_of_the_paper(small: Any) -> None:
    source = small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x")
    model = prepared(source)
    before = arrays(model)
    outcome = equalize(model, small.batches(), **RANGES)
    after = arrays(model)
    assert outcome.kept
    made, taken = size(before["w"], 0), size(before["v"], 1)
    scale = np.sqrt(made * taken) / taken  # equation 11
    np.testing.assert_allclose(after["w"], before["w"] / scale.reshape(-1, 1, 1, 1), rtol=1e-5)
    np.testing.assert_allclose(after["b"], before["b"] / scale, rtol=1e-5)
    np.testing.assert_allclose(after["v"], before["v"] * scale.reshape(1, -1, 1, 1), rtol=1e-5)
    np.testing.assert_array_equal(after["c"], before["c"])
    np.testing.assert_allclose(size(after["w"], 0), size(after["v"], 1), rtol=1e-5)


def test_pairs_of_a_depthwise_triple_converge_to_its_closed_formula(small: Any) -> None:
    model = prepared(small.build(TRIPLE, TRIPLE_WEIGHTS, "float[N,3,8,8] x"))
    before = arrays(model)
    equalize(model, small.batches(), **RANGES)
    after = arrays(model)
    ranges = [size(before["w"], 0), size(before["d"], 0), size(before["v"], 1)]
    mean = np.cbrt(ranges[0] * ranges[1] * ranges[2])
    first, second = ranges[0] / mean, mean / ranges[2]
    np.testing.assert_allclose(after["w"], before["w"] / first.reshape(-1, 1, 1, 1), rtol=1e-4)
    middle = before["d"] * (first / second).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(after["d"], middle, rtol=1e-4)
    np.testing.assert_allclose(after["e"], before["e"] / second, rtol=1e-4)
    np.testing.assert_allclose(after["v"], before["v"] * second.reshape(1, -1, 1, 1), rtol=1e-4)


def range_ratio(model: qwrap.WrappedModel) -> float:
    """Largest over median range of the outputs of a Conv, in the geometric mean over layers."""
    weights = arrays(model)
    nodes = [n for n in model.graph.nodes.values() if n.op_type == "Conv"]
    ranges = [size(weights[str(n.inputs[1].name)], 0) for n in nodes if n.inputs[1] is not None]
    return float(np.exp(np.mean([np.log(each.max() / np.median(each)) for each in ranges])))


@pytest.mark.parametrize("name", ["resnet20_cifar10", "mobilenetv2_cifar10_128"])
def test_on_real_networks_ranges_come_closer_and_float_outputs_stay(name: str) -> None:
    if not (default_folder() / "data" / "load.py").is_file():
        pytest.skip("no shared models here")
    shared = SharedModels(default_folder())
    batches = shared.calibration(name, 2)
    model = prepared(os.fspath(shared.path(name)), qwrap.QConfig(per_channel=False))
    inputs = list(iterate(batches, model))
    before, wanted = range_ratio(model), [float_model(model)(**x) for x in inputs]
    outcome = equalize(model, batches, progress=False)
    assert outcome.kept
    assert range_ratio(model) < before
    for x, float_output in zip(inputs, wanted, strict=True):
        found = float_model(model)(**x)
        assert (found - float_output).norm() <= 1e-5 * float_output.norm()


@pytest.mark.parametrize("balance", ["noise", "ranges"])
def test_a_planted_imbalance_is_removed_and_eight_bits_recover(small: Any, balance: Any) -> None:
    config = qwrap.QConfig(per_channel=False, scope="kernels")
    batches = small.batches(6)
    good = calibrated(small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x"), batches, config)
    source = imbalanced(small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x"), "w", "v", 1000)
    model = calibrated(source, batches, config)
    data = list(iterate(batches, model))
    wanted, ruined = HeldOut(good, data).error(), HeldOut(model, data).error()
    outcome = equalize(model, batches, balance=balance, progress=False)
    assert outcome.kept
    assert ruined > 100 * wanted
    assert HeldOut(model, data).error() < 1.5 * wanted
    made = size(arrays(model)["w"], 0)
    assert made.max() / np.median(made) < 4


FORMS = {
    "depthwise": (TRIPLE, TRIPLE_WEIGHTS, "float[N,3,8,8] x", (2, 3, 8, 8)),
    "groups": (
        "h = Conv(x, w, b) r = Relu(h) y = Conv<group=2>(r, v)",
        {**PAIR_WEIGHTS, "v": (4, 3, 1, 1)},
        "float[N,3,8,8] x",
        (2, 3, 8, 8),
    ),
    "one dimension": (
        "h = Conv(x, w, b) r = LeakyRelu(h) y = Conv(r, v)",
        {"w": (6, 3, 3), "b": (6,), "v": (4, 6, 1)},
        "float[N,3,9] x",
        (2, 3, 9),
    ),
    "three dimensions": (
        "h = Conv(x, w, b) r = Relu(h) y = Conv(r, v)",
        {"w": (6, 3, 2, 2, 2), "b": (6,), "v": (4, 6, 1, 1, 1)},
        "float[N,3,4,4,4] x",
        (2, 3, 4, 4, 4),
    ),
    "transposed": (
        "h = ConvTranspose(x, w, b) r = Relu(h) y = Conv(r, v)",
        {"w": (3, 6, 3, 3), "b": (6,), "v": (4, 6, 1, 1)},
        "float[N,3,8,8] x",
        (2, 3, 8, 8),
    ),
    "Gemm": (
        "h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Gemm(r, v)",
        {"w": (6, 12), "b": (6,), "v": (6, 5)},
        "float[N,12] x",
        (8, 12),
    ),
    "rows first": (
        "h = Gemm<transB=1>(x, w, b) t = Transpose(h) r = Relu(t) y = Gemm<transA=1>(r, v)",
        {"w": (6, 12), "b": (6,), "v": (6, 5)},
        "float[N,12] x",
        (8, 12),
    ),
    "MatMul": (
        "h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v)",
        {"w": (12, 6), "b": (6,), "v": (6, 5)},
        "float[N,12] x",
        (8, 12),
    ),
}


@pytest.mark.parametrize(("weight", "per_channel"), [("int4", True), ("uint8", False)])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_layer_keeps_its_float_function(
    small: Any, name: str, per_channel: bool, weight: str
) -> None:
    nodes, weights, inputs, shape = FORMS[name]
    rank = len(shape) if name not in ("Gemm", "rows first", "MatMul") else 2
    output = f"float[{','.join('NMHWD'[:rank])}] y"
    config = qwrap.QConfig(weight=weight, per_channel=per_channel, scope="kernels")
    source = small.build(nodes, weights, inputs, output)
    batches = small.batches(4, shape)
    model = calibrated(source, batches, config)
    before = [float_model(model)(torch.from_numpy(x)) for x in batches]
    outcome = equalize(model, batches, progress=False)
    assert not any("given up" in line for line in outcome.details)
    for x, wanted in zip(batches, before, strict=True):
        found = float_model(model)(torch.from_numpy(x))
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_file_runs_and_is_what_was_simulated(small: Any, tmp_path: Path) -> None:
    source = imbalanced(small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x"), "w", "v", 100)
    batches = small.batches(4)
    model = calibrated(source, batches)
    assert equalize(model, batches, progress=False)
    qwrap.export(model, tmp_path / "e.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "e.onnx").graph.node].count("Conv") == 2
    report = qwrap.verify(model, tmp_path / "e.onnx", batches, progress=False)
    assert report.ok if hasattr(report, "ok") else report
    (found,) = small.run(tmp_path / "e.onnx", batches[0])
    with torch.no_grad(), qwrap.exact(model):
        wanted = model(torch.from_numpy(batches[0])).numpy()
    np.testing.assert_array_equal(found, wanted)


def test_what_does_not_help_is_undone_bit_for_bit(small: Any) -> None:
    # What the first layer makes large was small before: the tensor between is as even as can be,
    # and equal weights make it uneven. That layer stays float, so its input counts for nothing.
    gains = np.geomspace(1, 1e4, 6).astype(np.float32)
    weights = {"w": np.diag(gains).reshape(6, 6, 1, 1), "b": (6,), "v": (4, 6, 1, 1), "c": (4,)}
    source = small.build(PAIR, weights, "float[N,6,8,8] x")
    batches = [x / gains.reshape(6, 1, 1) for x in small.batches(4, (2, 6, 8, 8))]
    config = qwrap.QConfig(scope="kernels")
    config.exclude("/h")
    model = calibrated(source, batches, config)
    model.train()
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    held = dict(model.named_parameters())
    before, graph, plan = copy.deepcopy(model.state_dict()), model.graph, model.plan
    torch.manual_seed(4)
    random = torch.get_rng_state()
    outcome = equalize(model, batches, **RANGES)
    assert not outcome.kept
    assert outcome.after > 10 * outcome.before
    assert_same_state(before, model.state_dict())
    assert model.graph is graph
    assert model.plan is plan
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p is held[name] for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_parameters_stay_the_same_objects_and_trained_ones_are_scaled_too(small: Any) -> None:
    source = imbalanced(small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x"), "w", "v", 1000)
    batches = small.batches(4)
    model = calibrated(source, batches, qwrap.QConfig(per_channel=False, scope="kernels"))
    held = dict(model.named_parameters())
    bias = model.stored("c")
    assert bias is not None
    with torch.no_grad():
        bias.add_(1.0)  # as an algorithm before this one may have done
    teacher = float_model(model)(torch.from_numpy(batches[0]))
    trained = arrays(model)
    assert equalize(model, batches, **RANGES)
    assert all(p is held[name] for name, p in model.named_parameters())
    found = arrays(model)
    np.testing.assert_array_equal(found["c"], trained["c"])
    after = float_model(model)(torch.from_numpy(batches[0]))  # the teacher has the bias it had
    assert (after - teacher).norm() <= 1e-5 * teacher.norm()


def test_lines_of_the_plan_are_neither_lost_nor_doubled(small: Any) -> None:
    nodes = "g = Conv(x, w) h = BatchNormalization(g, s, t, m, n) r = Relu(h) y = Conv(r, v)"
    vectors = {k: np.linspace(0.1, 3, 6, dtype=np.float32) for k in "stmn"}
    weights = {"w": (6, 3, 3, 3), "v": (4, 6, 1, 1), **vectors}
    source = small.build(nodes, weights, "float[N,3,8,8] x")
    batches = small.batches(4)
    model = calibrated(source, batches, qwrap.QConfig(per_channel=False, scope="kernels"))
    before = list(model.plan.changes)
    assert before
    first = equalize(model, batches, progress=False)
    assert model.plan.changes == before
    assert model.plan.outcomes[-1] is first
    assert "cross-layer equalization" in model.plan.summary()


CLIPPED = "h = Conv(x, w, b) r = Clip(h, zero, six) y = Conv(r, v)"


def clipped(small: Any, bound: float) -> onnx.ModelProto:
    weights = {"w": (6, 3, 3, 3), "b": (6,), "v": (4, 6, 1, 1)}
    model = imbalanced(small.build(CLIPPED, weights, "float[N,3,8,8] x"), "w", "v", 100)
    for name, value in (("zero", 0.0), ("six", bound)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    return model


def test_clips_are_kept_by_default_and_the_reason_is_told(small: Any) -> None:
    batches = small.batches(4)
    model = calibrated(clipped(small, 300.0), batches)
    outcome = equalize(model, batches, progress=False)
    assert not outcome.kept
    assert any("upper bound by a Clip" in line for line in outcome.details)


@pytest.mark.parametrize("bound", [1e4, 30.0])
def test_a_clip_becomes_a_relu_only_where_no_value_reaches_its_bound(
    small: Any, bound: float
) -> None:
    batches = small.batches(4)
    config = qwrap.QConfig(per_channel=False, scope="kernels")
    model = calibrated(clipped(small, bound), batches, config)
    outcome = equalize(model, batches, clipped="relu", **RANGES)
    assert outcome.kept == (bound > 1000)
    kinds = {node.op_type for node in model.graph.nodes.values()}
    assert ("Clip" in kinds) != outcome.kept


def test_a_bound_for_each_channel_is_exact(small: Any, tmp_path: Path) -> None:
    batches = small.batches(4)
    config = qwrap.QConfig(per_channel=False, scope="kernels")
    model = calibrated(clipped(small, 30.0), batches, config)
    wanted = [float_model(model)(torch.from_numpy(x)) for x in batches]
    outcome = equalize(model, batches, clipped="min", **RANGES)
    assert outcome.kept
    for x, float_output in zip(batches, wanted, strict=True):
        found = float_model(model)(torch.from_numpy(x))
        assert (found - float_output).norm() <= 1e-5 * float_output.norm()
    qwrap.export(model, tmp_path / "m.onnx")
    report = qwrap.verify(model, tmp_path / "m.onnx", batches, progress=False)
    assert report


def test_ranges_that_the_user_gave_are_kept(small: Any) -> None:
    batches = small.batches(4)
    config = qwrap.QConfig(scope="kernels")
    config.set("r", low=0.0, high=3.0)
    source = imbalanced(small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x"), "w", "v", 100)
    model = calibrated(source, batches, config)
    outcome = equalize(model, batches, progress=False)
    assert not outcome.kept
    assert any("range of" in line and "is given" in line for line in outcome.details)


def test_it_repeats_itself(small: Any) -> None:
    source = imbalanced(small.build(PAIR, PAIR_WEIGHTS, "float[N,3,8,8] x"), "w", "v", 50)
    found = []
    for _ in range(2):
        model = calibrated(source, small.batches(4))
        found.append((equalize(model, small.batches(4), progress=False), arrays(model)))
    assert found[0][0] == found[1][0]
    for name, array in found[0][1].items():
        np.testing.assert_array_equal(array, found[1][1][name])


def test_it_refuses_what_it_cannot_work_with(small: Any) -> None:
    model = qwrap.load(small.convs())
    with pytest.raises(ConfigError, match="not prepared"):
        equalize(model, small.batches())
    qwrap.prepare(model)
    with pytest.raises(ConfigError, match="balance='range': choose from"):
        equalize(model, small.batches(), balance="range")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="clipped='no': choose from"):
        equalize(model, small.batches(), clipped="no")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="iterations=0"):
        equalize(model, small.batches(), iterations=0)
    with pytest.raises(InputError, match="no batches"):
        equalize(model, [])


def test_a_model_of_which_nothing_is_quantized_is_left_alone(small: Any) -> None:
    batches = small.batches(4)
    source = small.convs()
    model = calibrated(source, batches, qwrap.QConfig(scope="kernels", excluded=["Conv"]))
    outcome = equalize(model, batches, progress=False)
    assert not outcome
    before = qwrap.load(source)
    assert all(torch.equal(model.stored(k), before.stored(k)) for k in ("w1", "b1", "w2", "b2"))
