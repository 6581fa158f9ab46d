"""Options that onnxruntime's tool takes and then ignores, or turns into something else."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.quant_utils as theirs
import pytest
from both_ways import INCUMBENT, OWN, Setting, Side, make_side
from one_operator import Batch, Case, Made, constants_of, make_batches, make_model
from onnx import ModelProto, TensorProto, numpy_helper
from operator_cases import LAYERS, ROWS, after_conv, alone
from ort_script import Reader

ADD = Case("y = Add(x, c)", ROWS, {"y": 2}, {"c": (16,)})


def range_of(quantized: ModelProto, name: str) -> tuple[float, float]:
    """The real values of the lowest and the highest uint8 code."""
    stored = constants_of(quantized)
    scale, zero = float(stored[f"{name}_scale"]), int(stored[f"{name}_zero_point"])
    return scale * (0 - zero), scale * (255 - zero)


def growing(count: int) -> list[Batch]:
    """Batches whose first is the widest."""
    rng = np.random.default_rng(0)
    return [
        {"x": (rng.normal(0, 1, (2, 16)) * (count - i)).astype(np.float32)} for i in range(count)
    ]


def side_of(folder: Path, case: Case, batches: Sequence[Batch]) -> Side:
    return Side(Made(make_model(case), batches), folder)


@pytest.mark.ort("G5", 73)
def test_folding_ranges_every_few_batches_loses_none(tmp_path: Path) -> None:
    """The incumbent clears its buffer: the last batches count alone, or 'No data is collected.'."""
    side = side_of(tmp_path, ADD, growing(8))
    whole = range_of(side.quantize(OWN), "x")
    for every in (1, 3, 4, 8):
        setting = Setting(options={"CalibMaxIntermediateOutputs": every})
        assert range_of(side.quantize(OWN, setting), "x") == whole
    three, four = (Setting(options={"CalibMaxIntermediateOutputs": every}) for every in (3, 4))
    assert range_of(side.quantize(INCUMBENT, three), "x")[1] < whole[1] / 2
    with pytest.raises(ValueError, match="No data is collected"):
        side.quantize(INCUMBENT, four)


def outliers() -> list[Batch]:
    """Normal values and a few that are forty times as large."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (4, 64, 16)).astype(np.float32)
    values[:, 0, 0] = 40
    return [{"x": batch} for batch in values]


@pytest.mark.ort("G6", 94)
def test_entropy_cuts_outliers(tmp_path: Path) -> None:
    """The incumbent's 128 bins for 128 levels leave one threshold to choose: the largest value."""
    side = side_of(tmp_path, ADD, outliers())
    assert range_of(side.quantize(INCUMBENT, Setting(method="Entropy")), "x")[1] > 39
    assert range_of(side.quantize(OWN, Setting(method="Entropy")), "x")[1] < 20


@pytest.mark.ort("G6", 94)
def test_zeros_do_not_pull_thresholds(tmp_path: Path) -> None:
    """Zero loses nothing when it is quantized, however many there are, as after a ReLU."""
    rng = np.random.default_rng(0)
    values = np.maximum(rng.normal(-0.5, 1, (4, 64, 16)), 0).astype(np.float32)
    side = side_of(tmp_path, ADD, [{"x": batch} for batch in values])
    high = range_of(side.quantize(OWN, Setting(method="Entropy")), "x")[1]
    assert high > 0.75 * values.max()


@pytest.mark.ort("G13", 74)
def test_the_hundredth_percentile_is_the_largest_value(tmp_path: Path) -> None:
    """The incumbent reads the left edge of the bin (corrected where files are compared)."""
    batches = outliers()
    onnx.save(make_model(ADD), tmp_path / "in.onnx")
    highs = {}
    for module in (OWN, INCUMBENT):
        calibrate = importlib.import_module(f"{module}.calibrate")
        with contextlib.redirect_stdout(io.StringIO()):
            calibrator = calibrate.create_calibrator(
                tmp_path / "in.onnx",
                augmented_model_path=str(tmp_path / "augmented.onnx"),
                calibrate_method=calibrate.CalibrationMethod.Percentile,
                extra_options={"percentile": 100.0},
            )
            calibrator.collect_data(Reader(batches))
            highs[module] = float(calibrator.compute_data()["x"].range_value[1])
    assert highs[OWN] == 40
    assert highs[INCUMBENT] < 39.99


@pytest.mark.ort("G14", 70)
@pytest.mark.parametrize("method", ["Percentile", "Entropy"])
def test_a_symmetric_range_is_symmetric(tmp_path: Path, method: str) -> None:
    """The incumbent clamps each side to what was seen: from -T to T becomes from 0 to T."""
    batches = [{"x": np.abs(batch["x"])} for batch in growing(4)]
    side = side_of(tmp_path, ADD, batches)
    setting = Setting(method=method, options={"CalibTensorRangeSymmetric": True})
    low, high = range_of(side.quantize(OWN, setting), "x")
    assert low == pytest.approx(-high, rel=0.01)  # 255 codes have no middle
    assert range_of(side.quantize(INCUMBENT, setting), "x")[0] == 0


@pytest.mark.ort("G15", 71, 72)
def test_the_constant_of_a_moving_average_counts(tmp_path: Path) -> None:
    """The incumbent takes the plain mean of the batches, whatever the constant is."""
    batches = growing(4)
    side = side_of(tmp_path, ADD, batches)
    highs = {
        module: [
            range_of(side.quantize(module, Setting(options=options)), "x")[1]
            for constant in (0.1, 0.9)
            if (options := {"CalibMovingAverage": True, "CalibMovingAverageConstant": constant})
        ]
        for module in (OWN, INCUMBENT)
    }
    assert highs[INCUMBENT][0] == highs[INCUMBENT][1]
    expected = batches[0]["x"].max()
    for batch in batches[1:]:
        expected += 0.1 * (batch["x"].max() - expected)
    # The range is rounded to codes: its ends are off by up to half a step.
    assert highs[OWN][0] == pytest.approx(expected, rel=0.01)
    assert highs[OWN][0] > 1.2 * highs[OWN][1]


@pytest.mark.ort("G17", 62)
@pytest.mark.parametrize(
    ("name", "axis", "size"), [("Conv", 1, 3), ("ConvTranspose", 0, 3), ("Gemm", 0, 16)]
)
def test_the_axis_asked_for_is_the_axis(tmp_path: Path, name: str, axis: int, size: int) -> None:
    """The incumbent honours it for MatMul and normalizations alone."""
    case = LAYERS[name]
    weights = {key: value for key, value in case.weights.items() if key != "b"}
    nodes = str(case.nodes).replace("(x, w, b)", "(x, w)")
    side = make_side(tmp_path, Case(nodes, case.inputs, case.outputs, weights))
    options = {"QDQOpTypePerChannelSupportToAxis": {name: axis}}
    setting = Setting(per_channel=True, options=options)
    own, theirs = (constants_of(side.quantize(m, setting)) for m in (OWN, INCUMBENT))
    assert own["w_scale"].shape == (size,)
    assert theirs["w_scale"].shape != (size,)
    assert side.quality(side.quantize(OWN, setting)) > 30


@pytest.mark.ort("G18", 57)
def test_a_product_of_activations_stays_float_where_asked(tmp_path: Path) -> None:
    """The incumbent ignores ``MatMulConstBOnly`` in the QDQ form."""
    side = make_side(tmp_path, LAYERS["MatMul_of_activations"])
    setting = Setting(options={"MatMulConstBOnly": True})
    own, theirs = (side.quantize(module, setting) for module in (OWN, INCUMBENT))
    assert [node.op_type for node in own.graph.node] == ["MatMul"]
    assert len(theirs.graph.node) == 7


@pytest.mark.ort("G19", 56)
@pytest.mark.parametrize(
    "nodes", ["Transpose<perm=[0,2,3,1]>(x)", "MaxPool<kernel_shape=[2,2]>(x)"]
)
def test_forcing_quantizes_in_the_operator_form_too(tmp_path: Path, nodes: str) -> None:
    """The incumbent dequantizes before the operator: the opposite."""
    side = make_side(tmp_path, alone(f"y = {nodes}"))
    setting = Setting(form="QOperator", options={"ForceQuantizeNoInputCheck": True})
    own = side.quantize(OWN, setting)
    types = [node.op_type for node in own.graph.node]
    assert types == ["QuantizeLinear", nodes.split("<")[0], "DequantizeLinear"]
    assert side.quality(own) > 40
    after = make_side(tmp_path, after_conv(f"y = {nodes}".replace("(x)", "(h)")))
    types = [node.op_type for node in after.quantize(INCUMBENT, setting).graph.node]
    assert types.index("DequantizeLinear") < types.index(nodes.split("<")[0])
    types = [node.op_type for node in after.quantize(OWN, setting).graph.node]
    assert types.index("DequantizeLinear") > types.index(nodes.split("<")[0])


def convs(ort: Any) -> dict[str, Any]:
    return {"TensorQuantOverrides": {"h": [{"quant_type": ort.QuantType.QUInt8, "convert": {
        "quant_type": ort.QuantType.QUInt16, "recv_nodes": {"/z"}}}]}}  # fmt: skip


@pytest.mark.ort("G24", 80)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"ActivationSymetric": True}}, "ActivationSymmetric"),
        ({"arguments": {"nodes_to_exclude": ["/hh"]}}, "'/h'"),
        ({"arguments": {"nodes_to_quantize": ["/yy"]}}, "'/y'"),
        ({"options": convs}, "/z"),
    ],
    ids=["option", "exclude", "quantize", "recv_nodes"],
)
def test_unknown_names_are_refused_before_calibration(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The incumbent accepts them without a word."""
    side = make_side(tmp_path, after_conv("y = Relu(h)"))
    setting = Setting(**changes)
    side.quantize(INCUMBENT, setting)
    unread = Side(Made(side.made.model, ()), tmp_path)  # data would fail: there is none
    with pytest.raises(ValueError, match=message):
        unread.quantize(OWN, setting)


@pytest.mark.ort("G26", 14)
def test_a_cache_of_another_model_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The incumbent takes any cache whose tensors have the same names."""
    cache = tmp_path / "ranges.json"
    setting = Setting(arguments={"calibration_cache_path": cache})
    first = make_side(tmp_path, after_conv("y = Relu(h)"))
    first.quantize(OWN, setting)
    caplog.clear()
    first.quantize(OWN, setting)
    assert not [record for record in caplog.records if str(cache) in record.getMessage()]
    assert json.loads(cache.read_text(encoding="utf8"))["CLS"] == "TensorsData"
    other = make_side(tmp_path, after_conv("y = Relu(h)", weights={"w": (4, 3, 3, 3), "b": (4,)}))
    other.made.model.graph.initializer[0].CopyFrom(scaled(other.made.model, "w", 50))
    other = Side(other.made, tmp_path)
    other.quantize(INCUMBENT, setting)
    caplog.clear()
    with pytest.raises(ValueError, match="another model"):
        other.quantize(OWN, setting)


def scaled(model: ModelProto, name: str, factor: float) -> TensorProto:
    array = constants_of(model)[name] * np.float32(factor)
    return numpy_helper.from_array(array, name)


@pytest.mark.ort("G29", 87)
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_value_does_not_become_the_scale(tmp_path: Path, value: float) -> None:
    """The incumbent: the scale is infinite, and every code the same."""
    batches = [dict(batch) for batch in make_batches(ADD)]
    batches[1]["x"] = batches[1]["x"].copy()
    batches[1]["x"][0, 0] = value
    side = side_of(tmp_path, ADD, batches)
    with np.errstate(invalid="ignore"):
        theirs = constants_of(side.quantize(INCUMBENT))
    assert not np.isfinite(theirs["x_scale"])
    own = constants_of(side.quantize(OWN))
    assert 0 < own["x_scale"] < 1


@pytest.mark.ort("G30", 126)
def test_int8_has_255_steps() -> None:
    """The incumbent subtracts in int8: -1."""
    from qwrap.ort import quant_utils as own

    with np.errstate(over="ignore"):
        assert theirs.get_qrange_for_qType(TensorProto.INT8) == -1
    assert own.get_qrange_for_qType(TensorProto.INT8) == 255
    assert own.get_qrange_for_qType(TensorProto.INT8, reduce_range=True) == 128
