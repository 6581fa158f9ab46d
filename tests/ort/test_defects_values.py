"""Files that onnxruntime's tool writes without a word, and that compute something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from both_ways import INCUMBENT, OWN, Setting, make_side
from one_operator import Case, constants_of, node_of, run
from operator_cases import CONTRIB, IMAGE, LAYERS, ROWS, after_conv

LINEAR = {"w": (16, 8), "b": (8,)}


def gemm(attributes: str) -> Case:
    return Case(f"y = Gemm<{attributes}>(x, w, b)", ROWS, {"y": 2}, {**LINEAR, "b": np.ones(8) * 2})


@pytest.mark.ort("G1", 184, 221)
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_beta_of_a_gemm_reaches_its_bias(tmp_path: Path, form: str, beta: float) -> None:
    """The incumbent multiplies the bias's scale by beta, then sets beta to 1: below 10 dB."""
    own, theirs = make_side(tmp_path, gemm(f"beta={beta}")).qualities(Setting(form=form))
    assert own > 35
    assert theirs < 15


@pytest.mark.ort("G1", 63)
def test_beta_stays_where_the_bias_is_not_quantized(tmp_path: Path) -> None:
    """The incumbent sets beta to 1 although it leaves the bias alone."""
    setting = Setting(options={"QuantizeBias": False})
    own, theirs = make_side(tmp_path, gemm("beta=0.5")).qualities(setting)
    assert own > 35
    assert theirs < 15


@pytest.mark.ort("G2", 224)
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_alpha_of_a_quantized_gemm_leaves_its_bias(tmp_path: Path, alpha: float) -> None:
    """QGemm multiplies the bias by alpha; the incumbent does not divide it out."""
    side = make_side(tmp_path, gemm(f"alpha={alpha}"))
    own, theirs = side.qualities(Setting(form="QOperator"))
    assert own > 35
    assert theirs < 15


@pytest.mark.ort("G3", 256)
@pytest.mark.parametrize(
    "nodes",
    [
        "h = Gemm<transB=1>(x, w) y = Gemm<transB=1>(h, w)",
        "g = Gather(w, i) h = Gemm<transB=1>(x, w) y = Add(h, g)",
    ],
    ids=["two Gemm", "Gather and Gemm"],
)
def test_a_transposed_weight_that_others_read_stays(tmp_path: Path, nodes: str) -> None:
    """The incumbent transposes the weight in place, for all its readers: below 0 dB."""
    weights = {"w": (16, 16), "i": np.zeros(1, np.int64)}
    side = make_side(tmp_path, Case(nodes, ROWS, {"y": 2}, weights))
    setting = Setting(form="dynamic", arguments={"op_types_to_quantize": ["MatMul", "Gemm"]})
    own, theirs = side.qualities(setting)
    assert own > 30
    assert theirs < 10


@pytest.mark.ort("G8", 186)
@pytest.mark.parametrize(
    "override", [{"symmetric": True, "quant_type": "QInt8"}, {"rmin": -5.0, "rmax": 20.0}]
)
def test_a_relu_stays_where_an_override_lets_negatives_pass(
    tmp_path: Path, override: dict[str, object]
) -> None:
    """The incumbent looks at ActivationSymmetric alone: its output reaches below zero."""

    def options(ort: object) -> dict[str, object]:
        values = dict(override)
        if "quant_type" in values:
            values["quant_type"] = ort.QuantType.QInt8  # type: ignore[attr-defined]
        else:
            values = {key: np.array(value, np.float32) for key, value in values.items()}
        return {"TensorQuantOverrides": {"y": [values]}}

    side = make_side(tmp_path, after_conv("y = Relu(h)"))
    lowest = {
        module: min(
            run(side.quantize(module, Setting(options=options)), batch)[0].min()
            for batch in side.made.batches
        )
        for module in (OWN, INCUMBENT)
    }
    assert lowest[OWN] >= 0
    assert lowest[INCUMBENT] < -0.1


@pytest.mark.ort("G9", 185)
def test_a_weight_of_three_dimensions_has_scales_along_its_last(tmp_path: Path) -> None:
    """The incumbent takes axis 1, along which the product is summed."""
    case = Case("y = MatMul(x, w)", {"x": (-1, 5, 16)}, {"y": 3}, {"w": (1, 16, 8)})
    side = make_side(tmp_path, case)
    setting = Setting(per_channel=True)
    own, theirs = (side.quantize(module, setting) for module in (OWN, INCUMBENT))
    assert constants_of(own)["w_scale"].size == 8
    assert constants_of(theirs)["w_scale"].size == 16
    assert side.quality(own, optimised=True) > 35
    operators = side.quantize(OWN, Setting(per_channel=True, form="QOperator"))
    assert side.quality(operators, optimised=True) > 35


@pytest.mark.ort("G10", 258)
def test_an_lstm_of_batches_first_keeps_its_axes(tmp_path: Path) -> None:
    """The incumbent drops ``layout=1``: the outputs' axes are in another order."""
    case = Case(
        {14: "y, h, c = LSTM<hidden_size=4, layout=1>(x, w, r, b)"},
        {"x": (2, 5, 16)},
        {"y": 4},
        CONTRIB["LSTM"].weights,
        half=False,
    )
    side = make_side(tmp_path, case)
    setting = Setting(form="dynamic")
    own, theirs = (side.quantize(module, setting) for module in (OWN, INCUMBENT))
    batch = side.made.batches[0]
    # onnxruntime's CPU kernel of LSTM refuses layout 1, so the float model is the other layout.
    other = make_side(
        tmp_path,
        Case(
            "y, h, c = LSTM<hidden_size=4>(x, w, r, b)",
            {"x": (5, 2, 16)},
            {"y": 4},
            CONTRIB["LSTM"].weights,
            half=False,
        ),
    )
    turned = {"x": np.ascontiguousarray(batch["x"].transpose(1, 0, 2))}
    wanted = run(other.made.model, turned)[0].transpose(2, 0, 1, 3)
    assert node_of(theirs, "DynamicQuantizeLSTM")
    assert not any(a.name == "layout" for a in node_of(theirs, "DynamicQuantizeLSTM").attribute)
    if any(node.op_type == "LSTM" for node in own.graph.node):
        assert node_of(own, "LSTM").attribute  # left as it was, layout and all
    else:
        (got,) = run(own, batch)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, atol=0.05)


@pytest.mark.ort("G11", 28)
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("name", ["Conv", "Gemm", "MatMul"])
def test_weights_in_constant_nodes_are_weights(tmp_path: Path, form: str, name: str) -> None:
    """The incumbent quantizes them at run time in the QDQ form, and fails in the other two."""
    side = make_side(tmp_path, LAYERS[name], constants=True)
    own = side.quantize(OWN, Setting(form=form, per_channel=True))
    assert constants_of(own)["w_quantized"].dtype == np.int8
    assert constants_of(own)["w_scale"].ndim == 1
    assert side.quality(own) > 35
    if form == "QDQ":
        theirs = side.quantize(INCUMBENT, Setting(form=form, per_channel=True))
        assert "w_quantized" not in constants_of(theirs)


@pytest.mark.ort("G11", 254)
def test_weights_in_constant_nodes_are_weights_of_a_dynamic_model(tmp_path: Path) -> None:
    """The incumbent: ValueError 'Expected w to be an initializer', or the product stays float."""
    setting = Setting(form="dynamic", weight="QUInt8")
    conv, matmul = (make_side(tmp_path, LAYERS[n], constants=True) for n in ("Conv", "MatMul"))
    for side in (conv, matmul):
        own = side.quantize(OWN, setting)
        assert constants_of(own)["w_quantized"].dtype == np.uint8
    assert "w_quantized" not in constants_of(matmul.quantize(INCUMBENT, setting))
    conv = make_side(tmp_path, LAYERS["Conv"], constants=True)
    with pytest.raises(ValueError, match="Expected w to be an initializer"):
        conv.quantize(INCUMBENT, setting)


@pytest.mark.ort("G16", 158)
def test_an_override_of_what_an_operator_passes_on_holds(tmp_path: Path) -> None:
    """The incumbent shares the input's parameters all the same."""
    scale = np.array(0.125, np.float32)
    overrides = {"y": [{"scale": scale, "zero_point": np.array(7, np.uint8)}]}
    side = make_side(tmp_path, after_conv("y = Transpose<perm=[0,2,3,1]>(h)"))
    setting = Setting(options={"TensorQuantOverrides": overrides})
    for module, holds in ((OWN, True), (INCUMBENT, False)):
        quantized = side.quantize(module, setting)
        last = next(n for n in quantized.graph.node if n.output[0] == "y")
        assert (constants_of(quantized)[last.input[1]] == scale) == holds


@pytest.mark.ort("G23", 134)
def test_a_range_for_all_channels_reaches_all_channels(tmp_path: Path) -> None:
    """The incumbent gives it to the first channel, in the QDQ form."""
    limits = {"rmin": np.array(-2.0, np.float32), "rmax": np.array(2.0, np.float32)}
    options = {"TensorQuantOverrides": {"w": [{"axis": 0, **limits}]}}
    side = make_side(tmp_path, LAYERS["Conv"])
    own, theirs = (
        constants_of(side.quantize(module, Setting(options=options)))["w_scale"]
        for module in (OWN, INCUMBENT)
    )
    np.testing.assert_allclose(own, [4 / 254] * 4, rtol=1e-6)
    assert np.sum(np.isclose(theirs, 4 / 254)) == 1


@pytest.mark.ort("G25", 8)
def test_an_excluded_node_computes_in_float(tmp_path: Path) -> None:
    """The incumbent leaves its neighbours' pairs on the excluded node's input and output."""
    side = make_side(
        tmp_path,
        Case(
            "p = Conv<pads=[1,1,1,1]>(x, w, b) q = Conv<pads=[1,1,1,1]>(p, w2, b2) "
            "r = Sigmoid(p) y = Add(q, r)",
            IMAGE,
            {"y": 4},
            {"w": (4, 3, 3, 3), "b": (4,), "w2": (4, 4, 3, 3), "b2": (4,)},
        ),
    )
    setting = Setting(arguments={"nodes_to_exclude": ["/q"]})
    for module, floating in ((OWN, True), (INCUMBENT, False)):
        quantized = side.quantize(module, setting)
        node = next(n for n in quantized.graph.node if n.name == "/q")
        made = {output: n.op_type for n in quantized.graph.node for output in n.output}
        assert (made[node.input[0]] == "Conv") == floating


@pytest.mark.ort("G27", 219)
def test_a_bias_too_large_for_its_scale_does_not_saturate(tmp_path: Path) -> None:
    """The incumbent protects int8 weights alone: here every bias is 2147483647."""
    case = Case(
        "y = Conv(x, w, b)",
        IMAGE,
        {"y": 4},
        {"w": np.random.default_rng(0).uniform(0, 1e-9, (4, 3, 3, 3)), "b": np.full(4, 50.0)},
    )
    side = make_side(tmp_path, case)
    for module, saturates in ((OWN, False), (INCUMBENT, True)):
        quantized = side.quantize(module, Setting(weight="QUInt8"))
        stored = constants_of(quantized)
        codes = stored.get("b_quantized", np.zeros(1, np.int32))
        assert bool((codes == 2**31 - 1).all()) == saturates
    assert side.quality(side.quantize(OWN, Setting(weight="QUInt8"))) > 30


@pytest.mark.ort("G28", 223)
def test_channels_of_a_quantized_conv_keep_the_type_asked_for(tmp_path: Path) -> None:
    """The incumbent makes them int8 whatever ``weight_type`` says."""
    side = make_side(tmp_path, LAYERS["Conv"])
    setting = Setting(form="QOperator", weight="QUInt8", per_channel=True)
    own, theirs = (side.quantize(module, setting) for module in (OWN, INCUMBENT))
    assert constants_of(own)["w_quantized"].dtype == np.uint8
    assert constants_of(theirs)["w_quantized"].dtype == np.int8
    assert side.quality(own, optimised=True) > 35


@pytest.mark.ort(230)
def test_a_relu_beside_other_readers_stays(tmp_path: Path) -> None:
    """The incumbent hands the codes before the Relu, negative ones too, to the Relu's readers."""
    case = after_conv(
        "r = Relu(h) s = Conv<pads=[1,1,1,1]>(r, w2, b2) t = Add(s, h) y = Relu(t)",
        weights={"w2": (4, 4, 3, 3), "b2": (4,)},
    )
    own, theirs = make_side(tmp_path, case).qualities(Setting(form="QOperator"))
    assert own > 25
    assert theirs < 15


@pytest.mark.ort("G31", 200)
def test_an_embedding_table_has_the_type_of_weights_where_asked(tmp_path: Path) -> None:
    """The incumbent: the activation type, one scale; the drop-in takes an override's."""
    case = Case(
        "y = Gather(table, ids)", {"ids": (-1, 4)}, {"y": 3}, {"table": (12, 8)},
        integers={"ids": 12},
    )  # fmt: skip
    side = make_side(tmp_path, case)
    options = {"TensorQuantOverrides": {"table": [{"axis": 0}]}}
    own = side.quantize(OWN, Setting(options=options))
    assert constants_of(own)["table_scale"].shape == (12,)
    assert side.quality(own) > 38
