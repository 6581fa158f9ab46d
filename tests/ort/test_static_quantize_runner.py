"""The command for static quantization against onnxruntime's."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import static_quantize_runner as incumbent

from qwrap.ort import static_quantize_runner as runner
from qwrap.ort.calibrate import CalibrationMethod
from qwrap.ort.entry.configs import StaticQuantConfig
from qwrap.ort.entry.options import check_options
from qwrap.ort.enums import QuantFormat, QuantType
from qwrap.ort.errors import MissingFileError, QuantizationError

COMMAND = "qwrap.ort.static_quantize_runner"


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Do what ``python -m`` does, without another process."""
    monkeypatch.delitem(sys.modules, COMMAND, raising=False)
    monkeypatch.setattr(sys, "argv", [COMMAND, *arguments])
    runpy.run_module(COMMAND, run_name="__main__")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with twelve data sets beside it; the tenth comes after the second."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2,8] x, float[2,8] z) => (float[2,6] y) {
            a = Add(x, z) m = MatMul(a, w) y = Relu(m) }"""
    )
    rng = np.random.default_rng(3)
    weight = rng.normal(0, 1, (8, 6)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    for node in proto.graph.node:
        node.name = f"/{node.output[0]}"
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    for number in range(12):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for index in range(2):
            value = np.full((2, 8), number + index / 2 + 0.25, np.float32)
            data = numpy_helper.from_array(value).SerializeToString()
            (folder / f"input_{index}.pb").write_bytes(data)
    return path


def config(model: Path, *arguments: str) -> StaticQuantConfig:
    given = runner.make_parser().parse_args(["-i", str(model), "-o", "o", *arguments])
    return runner.make_config(given, runner.OnnxModelCalibrationDataReader(model))


def incumbent_config(model: Path, *arguments: str) -> object:
    """What onnxruntime's command hands to its quantizer."""
    command = ["runner", "-i", str(model), "-o", "o", *arguments]
    handed: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(incumbent, "quantize", lambda **arguments: handed.update(arguments))
        incumbent.main()
    return handed["quant_config"]


def plain(told: object) -> dict[str, object]:
    kept = {k: v for k, v in vars(told).items() if k != "calibration_data_reader"}
    kept.pop("calibration_cache_path", None)
    return {k: getattr(v, "name", v) for k, v in kept.items()}


@pytest.mark.ort(326)
def test_data_sets_are_read_in_their_order(model: Path) -> None:
    reader = runner.OnnxModelCalibrationDataReader(str(model))
    batches = list(reader)
    assert [float(b["x"][0, 0]) for b in batches] == [n + 0.25 for n in range(12)]
    assert [float(b["z"][0, 0]) for b in batches] == [n + 0.75 for n in range(12)]
    assert reader.get_next() is None
    theirs = list(iter(incumbent.OnnxModelCalibrationDataReader(str(model)).get_next, None))
    assert sorted(float(b["x"][0, 0]) for b in theirs) == [n + 0.25 for n in range(12)]


@pytest.mark.ort(326, 349)
def test_data_sets_are_read_stride_by_stride(model: Path) -> None:
    reader = runner.OnnxModelCalibrationDataReader(model)
    assert len(reader) == 12
    reader.set_range(4, 6)
    assert [float(b["x"][0, 0]) for b in reader] == [4.25, 5.25]


@pytest.mark.ort(326)
def test_missing_data_is_named(model: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "m.onnx").write_bytes(model.read_bytes())
    with pytest.raises(MissingFileError, match="no folder test_data_set_0 beside"):
        runner.OnnxModelCalibrationDataReader(lonely / "m.onnx")
    with pytest.raises(FileNotFoundError, match="no such file"):
        runner.OnnxModelCalibrationDataReader(lonely / "none.onnx")
    (tmp_path / "test_data_set_0" / "input_1.pb").unlink()
    with pytest.raises(MissingFileError, match=r"input_1\.pb"):
        runner.OnnxModelCalibrationDataReader(model).get_next()
    (tmp_path / "test_data_set_0" / "input_1.pb").write_bytes(b"nothing of the kind")
    with pytest.raises(QuantizationError, match="holds no tensor"):
        runner.OnnxModelCalibrationDataReader(model).get_next()


# --- arguments -----------------------------------------------------------------------------------

FLAGS = ["--enable_subgraph", "--force_quantize_no_input_check", "--matmul_const_b_only",
         "--add_qdq_pair_to_weight", "--dedicated_qdq_pair", "--calib_tensor_range_symmetric",
         "--calib_moving_average", "--disable_quantize_bias", "--use_qdq_contrib_ops",
         "--qdq_keep_removable_activations", "--qdq_disable_weight_adjust_for_int32_bias",
         "--per_channel"]  # fmt: skip
NAMES = ["qint8", "quint8", "qint16", "quint16", "qint4", "quint4", "qfloat8e4m3fn"]


@pytest.mark.ort(327, 328)
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        *([flag] for flag in FLAGS),
        FLAGS,
        *(["--activation_type", name] for name in NAMES),
        *(["--weight_type", name] for name in NAMES),
        *(["--calibration_method", m] for m in ("minmax", "entropy", "percentile", "distribution")),
        *(["--quant_format", f] for f in ("qdq", "qoperator")),
        ["--op_types_to_exclude_output_quantization", "Add", "MatMul"],
        ["--minimum_real_range", "0.5"],
        ["--nodes_to_quantize", "/a", "/m"],
        ["--nodes_to_exclude", "/m"],
    ],
    ids=" ".join,
)
def test_each_argument_means_what_onnxruntimes_means(model: Path, arguments: list[str]) -> None:
    ours, theirs = config(model, *arguments), incumbent_config(model, *arguments)
    assert plain(ours) == plain(theirs)
    check_options(ours.extra_options, "QDQ")


@pytest.mark.ort(327, 328)
def test_defaults_are_the_documented_ones(model: Path) -> None:
    made = config(model)
    assert (made.activation_type, made.weight_type) == (QuantType.QUInt8, QuantType.QInt8)
    assert made.calibrate_method is CalibrationMethod.MinMax
    assert made.quant_format is QuantFormat.QDQ
    assert made.extra_options["MinimumRealRange"] == 0.0001
    with pytest.raises(SystemExit):
        runner.make_parser().parse_args(["-i", "a", "-o", "b", "--weight_type", "int8"])


@pytest.mark.ort(329, "G51")
def test_an_axis_is_a_number(model: Path) -> None:
    """onnxruntime's leaves it a text, at which its quantizer fails."""
    given = ["--op_per_channel_axis", "MatMul", "0", "--op_per_channel_axis", "Conv", "-1"]
    key = "QDQOpTypePerChannelSupportToAxis"
    assert config(model, *given).extra_options[key] == {"MatMul": 0, "Conv": -1}
    assert incumbent_config(model, *given).extra_options[key] == {"MatMul": "0", "Conv": "-1"}
    with pytest.raises(QuantizationError, match="the axis is no number"):
        config(model, "--op_per_channel_axis", "MatMul", "last")


@pytest.mark.ort(330, "G51")
def test_overrides_need_not_give_everything(model: Path, tmp_path: Path) -> None:
    """onnxruntime's wants scale and zero point of every entry, and knows no types."""
    file = tmp_path / "overrides.json"
    convert = {"quant_type": "QUInt8", "recv_nodes": ["/y"]}
    given = {
        "a": [{"scale": 0.25, "zero_point": 3, "quant_type": "quint8"}],
        "m": [{"quant_type": "QUInt16", "convert": convert}],
        "w": [{"quant_type": "QInt8", "axis": 1, "symmetric": True}],
        "x": [{"rmin": -1.0, "rmax": 2.0}],
    }
    file.write_text(json.dumps(given))
    with pytest.raises(KeyError):
        incumbent.get_tensor_quant_overrides(file)
    made = config(model, "--tensor_quant_overrides", str(file)).extra_options
    read = made["TensorQuantOverrides"]
    assert read["m"] == [
        {
            "quant_type": QuantType.QUInt16,
            "convert": {"quant_type": QuantType.QUInt8, "recv_nodes": {"/y"}},
        }
    ]
    assert read["w"] == [{"quant_type": QuantType.QInt8, "axis": 1, "symmetric": True}]
    assert read["x"] == given["x"]
    entry = read["a"][0]
    assert (entry["scale"].dtype, entry["zero_point"].dtype) == (np.float32, np.uint8)
    assert (float(entry["scale"]), int(entry["zero_point"])) == (0.25, 3)
    file.write_text(json.dumps({"a": [{"scale": 0.25, "zero_point": 3}]}))
    ours, theirs = (m.get_tensor_quant_overrides(file) for m in (runner, incumbent))
    assert ours == theirs
    assert runner.get_tensor_quant_overrides(None) == {}


@pytest.mark.ort(330)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "expected a list of settings"),
        ('{"a": 3}', "expected a list of settings"),
        ('{"a": [3]}', "tensor 'a': 3 are no settings"),
        ('{"a": [{"quant_type": "int8"}]}', "no type is called 'int8', only QInt8"),
    ],
)
def test_a_file_without_overrides_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(QuantizationError, match=message):
        runner.get_tensor_quant_overrides(tmp_path / "o.json")
    with pytest.raises(MissingFileError):
        runner.get_tensor_quant_overrides(tmp_path / "none.json")


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.ort(326, 327, 329)
def test_the_command_quantizes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["-i", str(model), "-o", str(tmp_path / "q.onnx"), "--per_channel"]
    run_command(monkeypatch, *command, "--op_per_channel_axis", "MatMul", "1")
    assert not capfd.readouterr().out
    made = onnx.load(tmp_path / "q.onnx")
    assert made.producer_name == "onnx.quantize"
    scales = {t.name: list(t.dims) for t in made.graph.initializer}
    assert scales["w_scale"] == [6]
    opened = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    feeds = runner.OnnxModelCalibrationDataReader(model).get_next()
    want = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
    scale = next(t for t in made.graph.initializer if t.name == "y_scale")
    step = float(numpy_helper.to_array(scale))
    # a step of the output, and as much for the rounding of input and weights
    assert np.abs(opened.run(None, feeds)[0] - want[0]).max() < 3 * step


@pytest.mark.ort(326)
def test_the_command_says_what_is_missing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["-i", str(tmp_path / "none.onnx")], "no such file"),
        (["-i", str(model), "--op_per_channel_axis", "MatMul", "x"], "the axis is no number"),
    ):
        with pytest.raises(SystemExit):
            runner.main([*arguments, "-o", str(tmp_path / "q.onnx")])
        assert message in capsys.readouterr().err
