"""Biases in QDQ form: int32 codes that mean what the float bias meant, fused or not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from one_operator import Case, constants_of, make, node_of, run, sqnr
from side_by_side import by_incumbent, by_qwrap, observed

ROWS = {"x": (6, 16)}
LINEAR = {"w": (16, 8), "b": (8,)}
IMAGE = {"x": (2, 3, 8, 8)}


def gemm(attributes: str, bias: tuple[int, ...] = (8,)) -> Case:
    weights = {"w": (16, 8), "b": np.random.default_rng(1).normal(0, 3, bias)}
    return Case(f"y = Gemm<{attributes}>(x, w, b)", ROWS, {"y": 2}, weights)


@pytest.mark.ort(184, 221, "G1")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0, 0.0, -1.5])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0, -1.0])
def test_gemm_is_right_for_every_alpha_and_beta(
    alpha: float, beta: float, per_channel: bool
) -> None:
    """onnxruntime's tool multiplies the scale by beta and forgets it: 7 dB for beta 0.5."""
    made = make(gemm(f"alpha={alpha}, beta={beta}"))
    model = by_qwrap(made.model, observed(made.model, made.batches), per_channel=per_channel)
    for optimised in (False, True):
        for batch in made.batches:
            wanted = run(made.model, batch)
            assert sqnr(wanted, run(model, batch, optimised)) > 35, optimised


@pytest.mark.ort("G1")
def test_the_incumbent_forgets_beta() -> None:
    made = make(gemm("beta=0.5"))
    model = by_incumbent(made.model, observed(made.model, made.batches))
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0])) < 20


@pytest.mark.ort(63, "G1")
def test_a_bias_that_stays_float_keeps_its_beta() -> None:
    made = make(gemm("beta=0.5"))
    ranges = observed(made.model, made.batches)
    model = by_qwrap(made.model, ranges, options={"QuantizeBias": False})
    assert constants_of(model)["b"].dtype == np.float32
    assert next(a.f for a in node_of(model, "Gemm").attribute if a.name == "beta") == 0.5
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0])) > 35


@pytest.mark.ort(221)
def test_codes_of_a_bias_are_those_of_the_contract() -> None:
    """QGemm adds beta C / (alpha s_a s_b) to the sum of products."""
    made = make(gemm("alpha=2.0, beta=0.5"))
    found = constants_of(by_qwrap(made.model, observed(made.model, made.batches)))
    scale = 2 * found["x_scale"] * found["w_scale"]
    np.testing.assert_array_equal(found["b_quantized_scale"], [scale])
    bias = constants_of(made.model)["b"].astype(np.float64)
    np.testing.assert_array_equal(found["b_quantized"], np.round(0.5 * bias / float(scale)))


@pytest.mark.ort(184, 217)
@pytest.mark.parametrize("shape", [(1, 8), (6, 8), (6, 1), (1,), ()])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_gemm_bias_of_any_shape_is_right(shape: tuple[int, ...], per_channel: bool) -> None:
    made = make(gemm("beta=2.0", shape))
    model = by_qwrap(made.model, observed(made.model, made.batches), per_channel=per_channel)
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 35


@pytest.mark.ort(217)
def test_zero_points_are_a_vector_of_zeros_beside_channels() -> None:
    made = make(Case("y = Conv(x, w, b)", IMAGE, {"y": 4}, {"w": (4, 3, 3, 3), "b": (4,)}))
    ranges = observed(made.model, made.batches)
    found = constants_of(by_qwrap(made.model, ranges, per_channel=True))
    zero = found["b_quantized_zero_point"]
    assert (zero.dtype, zero.shape, zero.any()) == (np.int32, (4,), np.False_)
    np.testing.assert_array_equal(
        found["b_quantized_scale"], found["x_scale"] * found["w_scale"], strict=True
    )


@pytest.mark.ort(183, "G43")
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8"])
def test_channels_of_a_grouped_transposed_convolution_repeat(weight: str) -> None:
    """onnxruntime's tool fails: operands could not be broadcast together."""
    case = Case(
        "y = ConvTranspose<group=2, strides=[2,2]>(x, w, b)",
        {"x": (2, 4, 5, 5)},
        {"y": 4},
        {"w": (4, 3, 3, 3), "b": (6,)},
    )
    made = make(case)
    ranges = observed(made.model, made.batches)
    model = by_qwrap(made.model, ranges, per_channel=True, weight=weight)
    found = constants_of(model)
    assert found["w_scale"].shape == (3,)
    np.testing.assert_array_equal(
        found["b_quantized_scale"], np.tile(found["x_scale"] * found["w_scale"], 2)
    )
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 35
    with pytest.raises(ValueError, match="broadcast"):
        by_incumbent(made.model, ranges, per_channel=True)


def tiny_weights() -> Case:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1e-9, (4, 3, 3, 3)).astype(np.float32)
    return Case("y = Conv(x, w, b)", IMAGE, {"y": 4}, {"w": weight, "b": np.array([3, -2, 1, 5.0])})


@pytest.mark.ort(219, "G27")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("weight", "options"),
    [
        ("QInt8", {}),
        ("QUInt8", {}),
        ("QUInt8", {"WeightSymmetric": True}),
        ("QInt8", {"WeightSymmetric": False}),
        ("QInt16", {}),
    ],
)
def test_scales_of_weights_grow_until_a_bias_fits(
    weight: str, options: dict[str, object], per_channel: bool
) -> None:
    """onnxruntime's tool does so for signed symmetric weights only."""
    made = make(tiny_weights())
    ranges = observed(made.model, made.batches)
    settings = {"weight": weight, "options": options, "per_channel": per_channel}
    model = by_qwrap(made.model, ranges, **settings)
    codes = constants_of(model)["b_quantized"].astype(np.int64)
    assert np.abs(codes).max() < 2**31 - 1
    for optimised in (False, True):
        got = run(model, made.batches[0], optimised)
        assert sqnr(run(made.model, made.batches[0]), got) > 35


@pytest.mark.ort("G27")
def test_the_incumbent_saturates_beside_unsigned_weights() -> None:
    made = make(tiny_weights())
    ranges = observed(made.model, made.batches)
    found = constants_of(by_incumbent(made.model, ranges, weight="QUInt8"))
    assert np.abs(found["b_quantized"].astype(np.int64)).max() >= 2**31 - 1


@pytest.mark.ort(66)
def test_scales_of_weights_stay_where_that_is_asked_for() -> None:
    made = make(tiny_weights())
    ranges = observed(made.model, made.batches)
    kept = by_qwrap(
        made.model, ranges, options={"QDQDisableWeightAdjustForInt32Bias": True}, weight="QInt8"
    )
    largest = np.abs(constants_of(made.model)["w"]).max()
    assert constants_of(kept)["w_scale"] == pytest.approx(largest / 127, rel=1e-6)
    grown = by_qwrap(made.model, ranges, weight="QInt8")
    assert constants_of(grown)["w_scale"] > 10 * largest / 127


@pytest.mark.ort(218)
def test_a_shared_bias_is_copied_for_the_second_node() -> None:
    nodes = "a = Conv(x, w, b) c = Conv(x, v, b) y = Add(a, c)"
    weights = {"w": (4, 3, 3, 3), "v": (4, 3, 3, 3), "b": (4,)}
    made = make(Case(nodes, IMAGE, {"y": 4}, weights))
    ranges = observed(made.model, made.batches)
    found = constants_of(by_qwrap(made.model, ranges))
    assert found["b_quantized"].dtype == found["b0_quantized"].dtype == np.int32
    assert found["b_quantized_scale"] != found["b0_quantized_scale"]


@pytest.mark.ort(218)
def test_a_bias_that_is_an_operand_too_does_not_become_8_bits() -> None:
    """onnxruntime's tool adds the operand's uint8 codes as bias."""
    nodes = "c = Add(b, b) a = Conv(x, w, b) d = Reshape(c, s) y = Mul(a, d)"
    rng = np.random.default_rng(3)
    weights = {
        "w": rng.normal(0, 0.001, (4, 3, 3, 3)),
        "b": np.array([9.0, 0.11, -0.13, 0.05]),
        "s": np.array([1, 4, 1, 1]),
    }
    made = make(Case(nodes, IMAGE, {"y": 4}, weights))
    found = constants_of(by_qwrap(made.model, observed(made.model, made.batches)))
    assert found["b_quantized"].dtype == np.uint8
    assert found["b0_quantized"].dtype == np.int32


@pytest.mark.ort(220)
def test_a_computed_bias_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    case = Case("c = Neg(b) y = Gemm(x, w, c)", ROWS, {"y": 2}, LINEAR)
    made = make(case)
    ranges = observed(made.model, made.batches)
    with caplog.at_level(logging.WARNING):
        model = by_qwrap(made.model, ranges)
    assert "Bias of Gemm node '/y' is not constant" in caplog.text
    assert node_of(model, "Gemm").input[2] == "c"
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0])) > 35


@pytest.mark.ort(203, 204, 205)
@pytest.mark.parametrize(
    ("operator", "extra"),
    [
        ("InstanceNormalization(x, w, b)", {}),
        ("LayerNormalization<axis=1>(x, w, b)", {}),
        ("BatchNormalization(x, w, b, m, v)", {"m": (3,), "v": np.array([1.0, 2.0, 0.5])}),
    ],
)
def test_the_bias_of_a_normalization_is_int32(operator: str, extra: dict[str, object]) -> None:
    made = make(
        Case(f"y = {operator}", {"x": (2, 3, 3)}, {"y": 3}, {"w": (3,), "b": (3,), **extra})
    )
    if "Layer" in operator:
        made = make(
            Case(
                "y = LayerNormalization(x, w, b)",
                {"x": (2, 3, 3)},
                {"y": 3},
                {"w": (3,), "b": (3,)},
            )
        )
    model = by_qwrap(made.model, observed(made.model, made.batches))
    found = constants_of(model)
    assert found["b_quantized"].dtype == np.int32
    assert found["w_quantized"].dtype == np.int8
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0], True)) > 25


@pytest.mark.ort(48, 222)
def test_float8_casts_its_bias() -> None:
    """The kernels next to float8 weights add float biases."""
    from qwrap.ort.calibrate import TensorData
    from qwrap.ort.qdq_quantizer import QDQQuantizer

    made = make(Case("y = Conv(x, w, b)", IMAGE, {"y": 4}, {"w": (4, 3, 3, 3), "b": (4,)}), 19)
    one = {"avg": np.float32(0), "std": np.float32(1)}
    ranges = {
        name: TensorData(lowest=np.float32(-3), highest=np.float32(3), **one) for name in "xy"
    }
    kind = 17  # TensorProto.FLOAT8E4M3FN
    model = QDQQuantizer(
        made.model, False, False, kind, kind, ranges, [], [], ["Conv"], {}
    ).quantize_model()
    cast = node_of(model, "Cast")
    assert (list(cast.input), list(cast.output)) == (["b_quantized"], ["b"])
    assert sqnr(run(made.model, made.batches[0]), run(model, made.batches[0])) > 15
