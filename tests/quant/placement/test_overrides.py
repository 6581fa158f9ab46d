"""What the user says of single tensors holds, in the simulation and in the file."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError, QwrapWarning
from qwrap.model.points import UsePoint, ValuePoint


def config_with(*overrides, **settings) -> qwrap.QConfig:
    config = qwrap.QConfig(scope="kernels", **settings)
    for selector, words in overrides:
        config.set(selector, **words)
    return config


def prepared(source, *overrides, **settings):
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config_with(*overrides, **settings))
    return model


def calibrated(small, source, *overrides, **settings):
    model = prepared(source, *overrides, **settings)
    qwrap.calibrate(model, small.batches(), progress=False)
    return model


def numbers(model, tensor: str) -> tuple[float, int]:
    stub = model.tap(ValuePoint(tensor))
    return float(stub.scale), int(stub.zero_point)


MOVED = "a = Conv(x, w) b = MaxPool<kernel_shape=[2,2]>(a) y = Conv(b, v)"
MOVED_WEIGHTS = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)}


def moved(small):
    return small.build(MOVED, MOVED_WEIGHTS)


def test_a_range_gives_the_scale_that_spreads_the_codes_over_it(small) -> None:
    model = calibrated(small, small.convs(), ("x", {"low": -2, "high": 8}))
    assert numbers(model, "x") == (np.float32(10 / 255), 51)
    assert numbers(model, "y")[0] != np.float32(10 / 255)


def test_a_range_is_widened_to_hold_zero(small) -> None:
    model = calibrated(small, small.convs(), ("x", {"low": 1, "high": 8}))
    assert numbers(model, "x") == (np.float32(8 / 255), 0)


def test_a_scale_is_taken_as_it_is(small) -> None:
    model = calibrated(small, small.convs(), ("x", {"scale": 0.1, "zero_point": 3}))
    assert numbers(model, "x") == (np.float32(0.1), 3)


def test_an_overridden_tensor_is_not_observed_and_needs_no_data(small) -> None:
    model = prepared(small.convs(), ("*", {"low": -1, "high": 1}))
    assert all(model.tap(p).observer is None for p in model.attached if isinstance(p, ValuePoint))
    qwrap.calibrate(model, small.batches(1), progress=False)
    assert numbers(model, "x") == (np.float32(2 / 255), 128)  # the even of two middle codes


def test_a_branch_without_data_stays_quantized_where_all_ranges_are_given(small) -> None:
    nodes = (
        "a = Conv(x, w) m = ReduceMean<keepdims=0>(x) g = Greater(m, z) "
        "r = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, v) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q = Conv(a, u) }> "
        "y = Relu(r)"
    )
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1)}
    source = small.build(nodes, weights | {"z": np.array(1e9, np.float32)})
    model = calibrated(small, source, ("p", {"low": -1, "high": 1}))
    assert model.plan.nodes["/p"].role == "integer"


def test_a_later_word_wins(small) -> None:
    words = ("*", {"low": -1, "high": 1}), ("x", {"low": -4, "high": 4})
    assert numbers(calibrated(small, small.convs(), *words), "x")[0] == np.float32(8 / 255)
    assert numbers(calibrated(small, small.convs(), *words[::-1]), "x")[0] == np.float32(2 / 255)


def test_a_later_method_takes_a_range_back(small) -> None:
    words = ("x", {"low": -1, "high": 1}), ("x", {"method": "minmax"})
    low, high = (f(small.batches()) for f in (np.min, np.max))
    scale, _ = numbers(calibrated(small, small.convs(), *words), "x")
    assert scale == pytest.approx((high - low) / 255, rel=1e-6)  # float32 of float64


def test_a_method_holds_for_its_tensor_alone(small) -> None:
    model = calibrated(
        small, small.convs(), ("x", {"method": "minmax"}), method="percentile", percentile=98
    )
    extremes = calibrated(small, small.convs(), method="minmax")
    plain = calibrated(small, small.convs(), method="percentile", percentile=98)
    assert numbers(model, "x") == numbers(extremes, "x") != numbers(plain, "x")
    assert numbers(model, "y") == numbers(plain, "y")


def test_a_percentile_holds_for_its_tensor_alone(small) -> None:
    model = calibrated(small, small.convs(), ("x", {"percentile": 90}), method="percentile")
    plain = calibrated(small, small.convs(), method="percentile")
    assert numbers(model, "x")[0] < 0.9 * numbers(plain, "x")[0]
    assert numbers(model, "y") == numbers(plain, "y")


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_moved_tensor_shares_the_override_of_its_source(small, quantized, name: str) -> None:
    config = config_with((name, {"low": -3, "high": 3}))
    result = quantized(moved(small), config=config)
    assert numbers(result.model, "a")[0] == np.float32(6 / 255)
    assert result.verify().deployed.differing == 0


def test_contradicting_words_on_one_scale_are_refused_by_name(small) -> None:
    words = ("a", {"low": -1, "high": 1}), ("b", {"low": -2, "high": 2})
    with pytest.raises(ConfigError, match=r"tensors 'a' and 'b' share one scale"):
        prepared(moved(small), *words)
    prepared(moved(small), words[0], ("b", words[0][1]))
    prepared(moved(small), ("*", words[0][1]), words[1])  # the second is the later word on both


def test_a_file_holds_what_was_set(small, quantized) -> None:
    config = config_with(("x", {"scale": 0.125, "zero_point": 100}), ("w1", {"scale": 0.01}))
    result = quantized(small.convs(), config=config)
    stored = {i.name: numpy_helper.to_array(i) for i in result.file().graph.initializer}
    assert stored["x_scale"] == np.float32(0.125)
    assert stored["x_zero_point"] == 100
    assert np.array_equal(stored["w1_scale"], np.full(6, 0.01, np.float32))
    assert result.verify().deployed.differing == 0


def test_a_weights_range_holds_for_every_channel(small) -> None:
    model = calibrated(small, small.convs(), ("w1", {"low": -0.5, "high": 0.25}))
    expected = torch.full((6,), 0.5 / 127)
    assert torch.equal(model.tap(UsePoint("/a", 1)).scale, expected)


def test_a_weights_method_holds_for_it_alone(small) -> None:
    model = calibrated(small, small.convs(), ("w1", {"method": "minmax"}), weight="int4")
    first, second = (model.tap(UsePoint(key, 1)) for key in ("/a", "/y"))
    largest = [model.stored(key).detach().abs().amax((1, 2, 3)) / 7 for key in ("w1", "w2")]
    # float32 of float64
    torch.testing.assert_close(first.scale, largest[0], rtol=1e-6, atol=0)
    assert (second.scale < 0.999 * largest[1]).any()


def test_a_table_and_what_is_looked_up_in_it_share_their_override(small) -> None:
    table = np.random.default_rng(0).normal(0, 1, (1024, 16)).astype(np.float32)
    source = small.build(
        "e = Gather(t, x) y = MatMul(e, w)",
        {"t": table, "w": (16, 8)},
        "int64[N,S] x",
        "float[N,S,8] y",
    )
    for name in ("t", "e"):
        model = prepared(source, (name, {"low": -2, "high": 2}))
        qwrap.calibrate(model, [np.arange(8).reshape(1, 8)], progress=False)
        assert numbers(model, "e")[0] == np.float32(4 / 255)
        assert float(model.tap(UsePoint("/e", 0)).scale) == np.float32(4 / 255)


CONCAT = "a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) y = Conv(c, u)"
CONCAT_WEIGHTS = {"w": (4, 3, 1, 1), "v": (4, 3, 1, 1), "u": (4, 8, 1, 1)}


def test_joined_tensors_take_over_a_range_that_holds_theirs(small, quantized) -> None:
    source = small.build(CONCAT, CONCAT_WEIGHTS)
    top = 2.5
    result = quantized(source, config=config_with(("a", {"low": -top, "high": top})))
    assert len({numbers(result.model, key) for key in "abc"}) == 1
    assert numbers(result.model, "a")[0] == np.float32(2 * top / 255)
    assert result.verify().deployed.differing == 0


def test_joined_tensors_leave_a_range_alone_that_is_too_small_for_them(small) -> None:
    source = small.build(CONCAT, CONCAT_WEIGHTS)
    model = calibrated(small, source, ("a", {"low": -0.25, "high": 0.25}))
    assert numbers(model, "a")[0] == np.float32(0.5 / 255)
    assert numbers(model, "c")[0] > 2 * numbers(model, "a")[0]


def test_a_range_is_cut_to_what_an_absorbed_relu_lets_through(small, quantized) -> None:
    result = quantized(small.convs(), config=config_with(("b", {"low": -1, "high": 4})))
    assert numbers(result.model, "b") == (np.float32(4 / 255), 0)
    assert result.verify().deployed.differing == 0


def test_the_plan_says_what_was_set(small) -> None:
    model = prepared(small.convs(), ("x", {"low": -1, "high": 1}), ("w1", {"scale": 0.01}))
    plan = json.loads(json.dumps(model.plan.to_dict()))
    assert plan["tensors"]["x"]["override"]["high"] == 1
    assert plan["tensors"]["x"]["fixed"] == [float(np.float32(2 / 255)), 128]
    assert [c[2]["override"]["scale"] for c in plan["constants"] if c[2]["override"]] == [0.01]


def test_a_state_dict_carries_overridden_scales(small) -> None:
    words = ("x", {"low": -1, "high": 1})
    model = calibrated(small, small.convs(), words)
    other = prepared(small.convs(), words)
    other.load_state_dict(model.state_dict())
    assert numbers(other, "x") == numbers(model, "x")


REFUSED = {
    r"set 'x1': fits no tensor; the nearest name is 'x'": ("x1", {"low": 0, "high": 1}, {}),
    r"set 'a': fits only tensors that are not quantized .*; the nearest name": (
        "a",
        {"low": 0, "high": 1},
        {},
    ),
    r"set 'b1': fits only biases": ("b1", {"scale": 1}, {}),
    r"tensor 'x': zero_point=256 lies outside of uint8, 0 … 255": (
        "x",
        {"scale": 1, "zero_point": 256},
        {},
    ),
    r"tensor 'x': zero_point=1, but its float8e4m3fn has none": (
        "x",
        {"scale": 1, "zero_point": 1},
        {"activation": "float8e4m3fn"},
    ),
    r"tensor 'w1': zero_point=1, but its int8 is symmetric and has only 0": (
        "w1",
        {"scale": 1, "zero_point": 1},
        {},
    ),
    r"tensor 'x': scale=1 needs a zero_point, as its uint8 is asymmetric": ("x", {"scale": 1}, {}),
    r"tensor 'x': zero_point=5, but its spec is restricted to 0 and 128": (
        "x",
        {"scale": 1, "zero_point": 5},
        {"activation": QuantSpec(dtype="uint8", symmetric=False, restricted=True)},
    ),
    r"tensor 'x': scale=0.3 is not a power of two, as its spec wants; give 0.5": (
        "x",
        {"scale": 0.3, "zero_point": 0},
        {"activation": QuantSpec(dtype="uint8", symmetric=False, power_of_two=True)},
    ),
    r"tensor 'x': scale=1e-60 is not a positive float32": (
        "x",
        {"scale": 1e-60, "zero_point": 0},
        {},
    ),
    r"tensor 'x': low=-inf, high=1: both ends must be finite": (
        "x",
        {"low": -np.inf, "high": 1},
        {},
    ),
    r"tensor 'b': scale=0.1, zero_point=3 has codes outside of \[0.0, inf\], what Relu '/b'": (
        "b",
        {"scale": 0.1, "zero_point": 3},
        {},
    ),
    r"set 'w1': method='entropy' is not for weights": ("w1", {"method": "entropy"}, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_had_is_refused_before_data_is_read(small, message: str) -> None:
    selector, words, settings = REFUSED[message]
    with pytest.raises(ConfigError, match=message):
        prepared(small.convs(), (selector, words), **settings)


def test_the_softmax_kernels_scale_cannot_be_replaced_in_8_bits(small) -> None:
    nodes = "a = Conv(x, w) s = Softmax<axis=1>(a) y = Conv(s, v)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    with pytest.raises(ConfigError, match=r"tensor 's': the integer kernel of Softmax is right"):
        prepared(source, ("s", {"low": 0, "high": 0.5}))
    prepared(source, ("s", {"scale": 1 / 256, "zero_point": 0}))
    prepared(source, ("*", {"method": "minmax"}))
    model = prepared(source, ("s", {"low": 0, "high": 0.5}), activation="uint16")
    assert model.plan.tensors["s"].fixed == (np.float32(0.5 / 65535), 0)


def test_a_scale_too_small_for_the_bias_is_enlarged_with_a_warning(small) -> None:
    weights = {"w1": (6, 3, 3, 3), "b1": np.full(6, 3e4, np.float32)}
    source = small.build("y = Conv(x, w1, b1)", weights)
    with pytest.warns(QwrapWarning, match=r"weight 'w1': scale=1e-09 would let codes of bias 'b1'"):
        calibrated(small, source, ("w1", {"scale": 1e-9}))


def test_a_pattern_with_brackets_in_a_name_is_also_taken_literally(small) -> None:
    source = small.convs()
    source.graph.input[0].name = "x[0]"
    source.graph.node[0].input[0] = "x[0]"
    onnx.checker.check_model(source)
    model = prepared(source, ("x[0]", {"low": 0, "high": 1}))
    assert model.plan.tensors["x[0]"].fixed == (np.float32(1 / 255), 0)
