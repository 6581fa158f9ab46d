"""Models and options on which onnxruntime's tool stops, hangs, or writes what cannot be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from both_ways import INCUMBENT, OWN, Setting, Side, make_side
from one_operator import (
    Batch,
    Case,
    Made,
    constants_of,
    make_batches,
    make_model,
    node_of,
    open_session,
)
from onnx import numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph
from operator_cases import CASES, IMAGE, LAYERS, ROWS, after_conv
from ort_script import quantize

INVALID = (Fail, InvalidArgument, InvalidGraph)

HANGS = """
import sys
from onnxruntime.quantization import quantize_static, get_qdq_config, quantize
class Reader:
    def get_next(self): return None
import onnxruntime.quantization as q
import onnx, numpy as np
from onnxruntime.quantization.calibrate import TensorData, TensorsData, CalibrationMethod
data = TensorsData(CalibrationMethod.MinMax, {n: (np.float32(-1), np.float32(1)) for n in "xty"})
q.QDQQuantizer(onnx.load(sys.argv[1]), False, False, q.QuantType.QInt8, q.QuantType.QUInt8, data,
    [], [], ["Transpose"], {"ForceQuantizeNoInputCheck": True}).quantize_model()
"""


@pytest.mark.ort("G32", 174)
def test_an_operator_after_a_dequantized_input_is_quantized(tmp_path: Path) -> None:
    """The incumbent never returns: it waits for the parameters of a tensor it left alone."""
    case = Case(
        "q = QuantizeLinear(x, s, z) t = DequantizeLinear(q, s, z) y = Transpose<perm=[1,0]>(t)",
        ROWS,
        {"y": 2},
        {"s": np.array(0.05, np.float32), "z": np.array(128, np.uint8)},
    )
    side = make_side(tmp_path, case)
    setting = Setting(options={"ForceQuantizeNoInputCheck": True})
    assert side.quality(side.quantize(OWN, setting)) > 30
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", HANGS, str(side.source)], timeout=4, check=False)


def of_every_length(case: Case) -> list[Batch]:
    return [make_batches(Case("", {"x": (n, *case.inputs["x"][1:])}, {}), 1)[0] for n in (1, 3, 2)]


@pytest.mark.ort("G33", 93)
@pytest.mark.parametrize("method", ["Entropy", "Percentile"])
def test_batches_may_differ_in_size(tmp_path: Path, method: str) -> None:
    """The incumbent makes one array of all batches: 'inhomogeneous shape'."""
    case = LAYERS["MatMul"]
    side = Side(Made(make_model(case), of_every_length(case)), tmp_path)
    setting = Setting(method=method)
    assert side.quality(side.quantize(OWN, setting)) > 25
    with pytest.raises(ValueError, match="inhomogeneous"):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G34", 49)
@pytest.mark.parametrize("method", ["Percentile", "Entropy"])
def test_float16_activations_have_histograms(tmp_path: Path, method: str) -> None:
    """The incumbent, with 2048 bins: 'Too many bins for data range'."""
    side = make_side(tmp_path, CASES["Conv"], half=True)
    setting = Setting(method=method, options={"CalibPercentile": 99.9})
    own = side.quantize(OWN, setting)
    assert constants_of(own)["x_scale"].dtype == np.float16
    assert side.quality(own) > 20
    if method == "Percentile":
        with pytest.raises(ValueError, match="Too many bins"):
            side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G35", 130)
@pytest.mark.parametrize(
    "override",
    [
        {"scale": 0.03, "zero_point": 128},
        {"scale": np.float32(0.03), "zero_point": np.uint8(128)},
        {"rmin": -4.0, "rmax": 4.0},
    ],
    ids=["Python", "numpy", "range"],
)
def test_overrides_are_plain_numbers(tmp_path: Path, override: dict[str, Any]) -> None:
    """The incumbent wants arrays of no dimension: AttributeError or TypeError."""
    side = make_side(tmp_path, LAYERS["Conv"])
    setting = Setting(options={"TensorQuantOverrides": {"x": [override]}})
    scale = constants_of(side.quantize(OWN, setting))["x_scale"]
    assert scale == np.float32(override.get("scale", 8 / 255))
    with pytest.raises((AttributeError, TypeError)):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G36", 140)
def test_every_override_is_checked(tmp_path: Path) -> None:
    """The incumbent returns after the first."""
    side = make_side(tmp_path, LAYERS["Conv"])
    overrides = {"x": [{"symmetric": False}], "nobody": [{"symmetric": True}]}
    setting = Setting(options={"TensorQuantOverrides": overrides})
    side.quantize(INCUMBENT, setting)
    with pytest.raises(ValueError, match="nobody"):
        side.quantize(OWN, setting)


@pytest.mark.ort("G36", 163, 267)
def test_the_type_of_every_override_counts(tmp_path: Path) -> None:
    """The incumbent misses int4 in the second entry: INVALID_GRAPH at opset 17."""

    def options(ort: Any) -> dict[str, Any]:
        return {"TensorQuantOverrides": {
            "x": [{"quant_type": ort.QuantType.QUInt8}], "w": [{"quant_type": ort.QuantType.QInt4}],
        }}  # fmt: skip

    side = make_side(tmp_path, LAYERS["MatMul"])
    setting = Setting(options=options)
    assert side.quality(side.quantize(OWN, setting)) > 15
    with pytest.raises(INVALID):
        open_session(side.quantize(INCUMBENT, setting))


@pytest.mark.ort("G37", 151)
def test_receivers_may_be_a_list(tmp_path: Path) -> None:
    """The incumbent subtracts a list from a set: TypeError."""

    def options(ort: Any) -> dict[str, Any]:
        convert = {"quant_type": ort.QuantType.QUInt16, "recv_nodes": ["/y"]}
        return {"TensorQuantOverrides": {
            "h": [{"quant_type": ort.QuantType.QUInt8, "convert": convert}]
        }}  # fmt: skip

    side = make_side(tmp_path, after_conv("y = Sigmoid(h)"))
    setting = Setting(options=options)
    assert "h_scale_convert" in constants_of(side.quantize(OWN, setting))
    with pytest.raises(TypeError):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G38", 128)
def test_one_scale_serves_all_channels(tmp_path: Path) -> None:
    """The incumbent: IndexError."""
    override = {"axis": 0, "scale": np.array(0.01, np.float32), "zero_point": np.array(0, np.int8)}
    side = make_side(tmp_path, LAYERS["Conv"])
    setting = Setting(options={"TensorQuantOverrides": {"w": [override]}})
    np.testing.assert_array_equal(
        constants_of(side.quantize(OWN, setting))["w_scale"], np.full(4, 0.01, np.float32)
    )
    with pytest.raises(IndexError):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G39", 243)
def test_a_where_after_quantized_nodes_stays_float(tmp_path: Path) -> None:
    """The incumbent appends it without its inputs: 'unknown initializers/tensors'."""
    side = make_side(tmp_path, CASES["Where_after_Add"])
    setting = Setting(form="QOperator")
    assert side.quality(side.quantize(OWN, setting)) > 30
    with pytest.raises(RuntimeError, match="unknown initializers/tensors"):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G40", 18)
@pytest.mark.parametrize("weight", ["QInt4", "QUInt4"])
@pytest.mark.parametrize("form", ["QOperator", "dynamic"])
def test_types_without_operators_are_refused(tmp_path: Path, form: str, weight: str) -> None:
    """The incumbent: RuntimeError 'must be 8-bit before packing', deep inside."""
    side = make_side(tmp_path, LAYERS["MatMul"])
    setting = Setting(form=form, weight=weight)
    with pytest.raises(ValueError, match=r"4-bit|QU?Int4"):
        Side(Made(side.made.model, ()), tmp_path).quantize(OWN, setting)
    with pytest.raises(RuntimeError, match="must be 8-bit"):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort("G41", 23)
@pytest.mark.parametrize("weight", ["QInt16", "QUInt16"])
def test_16_bit_weights_of_integer_operators_are_refused(tmp_path: Path, weight: str) -> None:
    """The incumbent writes a model that no session opens."""
    side = make_side(tmp_path, LAYERS["MatMul"])
    setting = Setting(form="dynamic", weight=weight)
    with pytest.raises(ValueError, match=weight):
        side.quantize(OWN, setting)
    with pytest.raises(INVALID):
        open_session(side.quantize(INCUMBENT, setting))


@pytest.mark.ort("G42", 49, 125)
@pytest.mark.parametrize("form", ["QOperator", "dynamic"])
def test_float16_models_load_in_every_form(tmp_path: Path, form: str) -> None:
    """The incumbent's files are invalid graphs."""
    side = make_side(tmp_path, LAYERS["MatMul"], half=True)
    setting = Setting(form=form)
    assert side.quality(side.quantize(OWN, setting), optimised=True) > 30
    with pytest.raises(INVALID):
        open_session(side.quantize(INCUMBENT, setting))


@pytest.mark.ort("G42", 53)
def test_restricted_zero_points_keep_the_type_of_scales(tmp_path: Path) -> None:
    """The incumbent writes float32 scales for float16 tensors."""
    side = make_side(tmp_path, LAYERS["Conv"], half=True)
    setting = Setting(options={"ActivationRestrictedAsymmetric": True})
    own = side.quantize(OWN, setting)
    assert constants_of(own)["x_scale"].dtype == np.float16
    assert side.quality(own) > 30
    with pytest.raises(INVALID):
        open_session(side.quantize(INCUMBENT, setting))


@pytest.mark.ort("G43", 183)
def test_a_grouped_transposed_convolution_has_scales_per_channel(tmp_path: Path) -> None:
    """The incumbent cannot broadcast the bias's scales."""
    case = Case(
        "y = ConvTranspose<group=3>(x, w, b)", IMAGE, {"y": 4}, {"w": (3, 2, 3, 3), "b": (6,)}
    )
    side = make_side(tmp_path, case)
    setting = Setting(per_channel=True)
    assert side.quality(side.quantize(OWN, setting)) > 35
    with pytest.raises(ValueError, match="broadcast"):
        side.quantize(INCUMBENT, setting)


BRANCHES = """
    h = MatMul(x, w) total = ReduceSum<keepdims=0>(h) positive = Greater(total, zero)
    y = If(positive) <
        then_branch = then () => (float[N,8] p) { t = MatMul(h, v) p = Relu(t) },
        else_branch = otherwise () => (float[N,8] q) { q = MatMul(h, v) }
    >
"""
BRANCHED = Case(
    BRANCHES, ROWS, {"y": 2}, {"w": (16, 8), "v": (8, 8), "zero": np.array(0.0)}, half=False
)


@pytest.mark.ort("G44", 55, 272)
def test_a_body_is_quantized_statically(tmp_path: Path) -> None:
    """The incumbent ignores ``EnableSubgraph`` in static quantization."""
    side = Side(Made(make_model(BRANCHED), make_batches(BRANCHED, 8)), tmp_path)
    for form, wanted in (("QDQ", "QuantizeLinear"), ("QOperator", "QLinearMatMul")):
        setting = Setting(form=form, options={"EnableSubgraph": True})
        own, theirs = (side.quantize(module, setting) for module in (OWN, INCUMBENT))
        types = [
            {node.op_type for node in node_of(model, "If").attribute[0].g.node}
            for model in (own, theirs)
        ]
        assert wanted in types[0]
        assert wanted not in types[1]
        assert side.quality(own) > 30


@pytest.mark.ort("G45", 187)
def test_a_tensor_that_a_body_reads_keeps_its_name(tmp_path: Path) -> None:
    """The incumbent renames it with the Relu it removes: INVALID_GRAPH."""
    nodes = """
        c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) m = ReduceSum<keepdims=0>(r)
        positive = Greater(m, zero)
        y = If(positive) <
            then_branch = then () => (float[A,B,C,D] p) { p = Add(c, r) },
            else_branch = otherwise () => (float[A,B,C,D] q) { q = Identity(c) }
        >
    """
    weights = {"w": (4, 3, 3, 3), "b": (4,), "zero": np.array(0.0)}
    side = make_side(tmp_path, Case(nodes, IMAGE, {"y": 4}, weights))
    assert side.quality(side.quantize(OWN)) > 25
    with pytest.raises(INVALID):
        open_session(side.quantize(INCUMBENT))


@pytest.mark.ort("G48", 69)
def test_blocks_are_for_weights_that_have_them(tmp_path: Path) -> None:
    """The incumbent: NotImplementedError at the first Conv."""
    case = after_conv("f = Flatten(h) y = MatMul(f, v)", 2, {"v": (256, 8)})
    side = make_side(tmp_path, case, opset=21)
    setting = Setting(options={"BlockSize": 32}, per_channel=False)
    own = side.quantize(OWN, setting)
    assert constants_of(own)["v_scale"].shape == (8, 8)
    assert constants_of(own)["w_scale"].size == 1
    assert side.quality(own) > 30
    with pytest.raises(NotImplementedError):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort(48, 105)
def test_a_softmax_of_float8_has_a_scale(tmp_path: Path) -> None:
    """The incumbent: AttributeError, the range from 0 to 1 has no deviation."""
    side = make_side(tmp_path, CASES["Softmax"])
    kind = "QFLOAT8E4M3FN"
    setting = Setting(activation=kind, weight=kind, method="Distribution")
    assert side.quality(side.quantize(OWN, setting)) > 20
    with pytest.raises(AttributeError, match="avg"):
        side.quantize(INCUMBENT, setting)


@pytest.mark.ort(2)
def test_a_model_in_memory_keeps_its_weights(tmp_path: Path) -> None:
    """The incumbent moves weights of a kilobyte into a file, and deletes the file."""
    case = Case("y = Add(x, c)", ROWS, {"y": 2}, {"c": (64, 16)}, half=False)
    for module, kept in ((OWN, True), (INCUMBENT, False)):
        made = make_model(case)
        before = made.SerializeToString()
        side = Side(Made(made, make_batches(case)), tmp_path)
        batches = [{"x": np.zeros((64, 16), np.float32)}]
        quantize(module, made, batches, tmp_path / "out.onnx", Setting())
        assert (made.SerializeToString() == before) == kept
        assert side.source.exists()
        if kept:
            assert numpy_helper.to_array(made.graph.initializer[0]).shape == (64, 16)


@pytest.mark.ort("G65", 276)
def test_nothing_is_written_beside_the_input(tmp_path: Path) -> None:
    """The incumbent writes ``<stem>-inferred.onnx`` there, which races and needs the right to."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    side = make_side(folder, LAYERS["Conv"])
    (folder / "float-inferred.onnx").write_bytes(b"of someone else")
    side.folder = out
    for setting in (Setting(), Setting(form="QOperator"), Setting(form="dynamic", weight="QUInt8")):
        side.quantize(OWN, setting)
        assert (folder / "float-inferred.onnx").read_bytes() == b"of someone else"
        assert len(list(folder.iterdir())) == 2
    side.quantize(INCUMBENT)
    assert not (folder / "float-inferred.onnx").exists()
