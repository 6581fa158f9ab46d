"""quant_pre_process, its command line, and onnxruntime's optimization as a step."""

from __future__ import annotations

import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import quant_utils as incumbent_utils
from onnxruntime.quantization import shape_inference as incumbent

from qwrap.ort import preprocess, shape_inference
from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.files import optimization, symbolic
from qwrap.ort.files.metadata import model_has_pre_process_metadata

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
COMMAND = "qwrap.ort.preprocess"
ROOT = Path(__file__).resolve().parents[2]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Do what ``python -m`` does, without another process."""
    monkeypatch.delitem(sys.modules, COMMAND, raising=False)
    monkeypatch.setattr(sys, "argv", [COMMAND, *arguments])
    runpy.run_module(COMMAND, run_name="__main__")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)


def parse(text: str, weights: dict[str, np.ndarray], version: int = 17) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {version}]> g {text}')
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def normalized_conv(version: int = 17) -> onnx.ModelProto:
    text = """(float[N,3,8,8] x) => (float[] y) {
        c = Conv<pads=[1,1,1,1]>(x, w) b = BatchNormalization(c, s, t, m, v) y = Relu(b) }"""
    weights = {"w": random(5, 3, 3, 3), "s": random(5), "t": random(5), "m": random(5)}
    return parse(text, {**weights, "v": np.ones(5, np.float32)}, version)


def outputs(model: onnx.ModelProto | Path, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = model if isinstance(model, Path) else model.SerializeToString()
    opened = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return opened.run(None, feeds)


def signature(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    return [(n.op_type, n.domain, n.name, *n.input, "=>", *n.output) for n in model.graph.node]


def declared(model: onnx.ModelProto) -> dict[str, bytes]:
    made = {name for node in model.graph.node for name in node.output}
    return {v.name: v.type.SerializeToString() for v in model.graph.value_info if v.name in made}


@pytest.mark.ort(317, 320, 321, 323)
def test_the_result_is_onnxruntimes(tmp_path: Path) -> None:
    ours, theirs = (
        inspect.signature(shape_inference.quant_pre_process),
        inspect.signature(incumbent.quant_pre_process),
    )
    assert {p.name: p.default for p in ours.parameters.values()} == {
        p.name: p.default for p in theirs.parameters.values()
    }
    path = tmp_path / "m.onnx"
    onnx.save(normalized_conv(), path)
    shape_inference.quant_pre_process(path, tmp_path / "ours.onnx")
    incumbent.quant_pre_process(path, tmp_path / "theirs.onnx", skip_symbolic_shape=True)
    mine, other = onnx.load(tmp_path / "ours.onnx"), onnx.load(tmp_path / "theirs.onnx")
    assert [n.op_type for n in mine.graph.node] == ["Conv", "Relu"]
    assert signature(mine) == signature(other)
    assert list(mine.graph.initializer) == list(other.graph.initializer)
    assert declared(mine) == declared(other) != {}
    assert model_has_pre_process_metadata(mine)
    assert incumbent_utils.model_has_pre_process_metadata(mine)
    x = random(2, 3, 8, 8)
    got, want = outputs(mine, x=x)[0], outputs(normalized_conv(), x=x)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # the fold rounds once more


@pytest.mark.ort(317, 319, 320, 321)
@pytest.mark.parametrize(
    "name",
    [
        "mnist_cntk",
        "super_resolution",
        "resnet20_cifar10",
        "nanodet_m_320",
        "stories260k",
        "espnetv2_s2_voc_256",
        "ppocr_en_number_rec",
        "squeezenet1_0_imagenet",
    ],
)
def test_real_models_become_what_onnxruntime_makes_of_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    monkeypatch.chdir(tmp_path)  # onnxruntime's writes there
    ours = shape_inference.quant_pre_process(path)
    incumbent.quant_pre_process(path, tmp_path / "theirs.onnx", skip_symbolic_shape=True)
    theirs = onnx.load(tmp_path / "theirs.onnx")
    assert signature(ours) == signature(theirs)
    assert {t.name for t in ours.graph.initializer} == {t.name for t in theirs.graph.initializer}
    assert set(declared(theirs)) <= set(declared(ours))


@pytest.mark.ort(319, "G79")
@pytest.mark.parametrize("name", ["minilm_l6", "silero_vad"])
def test_shapes_that_cannot_be_inferred_stop_nobody(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's fails, and leaves the model's weights in the working directory."""
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    shape_inference.quant_pre_process(path, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cwd", "out.onnx"]
    assert not list((tmp_path / "cwd").iterdir())
    made = onnx.load(tmp_path / "out.onnx")
    assert model_has_pre_process_metadata(made)
    assert len(made.graph.value_info) >= len(made.graph.node) // 2


@pytest.mark.ort(319)
def test_symbols_are_carried_through_arithmetic_of_shapes() -> None:
    model = parse(
        """(float[N,T] x) => (float[] y) { y = Concat<axis=1>(x, x) }""",
        {},
    )
    pytest.importorskip("sympy")
    assert symbolic.declare_symbolic(model)
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dims] == ["N", "2*T"]


@pytest.mark.ort(319, 363)
def test_without_sympy_the_step_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime's raises an ImportError; the other steps find most shapes by themselves."""
    monkeypatch.setitem(sys.modules, "onnxruntime.tools.symbolic_shape_infer", None)
    made = shape_inference.quant_pre_process(normalized_conv())
    assert [n.op_type for n in made.graph.node] == ["Conv", "Relu"]
    assert len(declared(made)) == 1


@pytest.mark.ort(317, 319, 320, 321)
def test_each_step_can_be_left_out() -> None:
    model = normalized_conv()
    call = shape_inference.quant_pre_process
    none = {"skip_optimization": True, "skip_onnx_shape": True, "skip_symbolic_shape": True}
    untouched = call(model, **none)
    assert signature(untouched) == signature(model)
    assert not untouched.graph.value_info
    assert model_has_pre_process_metadata(untouched)
    assert len(call(model, **{**none, "skip_optimization": False}).graph.node) == 2
    assert set(declared(call(model, **{**none, "skip_onnx_shape": False}))) == {"c", "b"}


@pytest.mark.ort(317, "G76")
def test_a_message_is_not_changed_and_comes_back_where_no_path_is_given() -> None:
    model = normalized_conv(version=9)
    before = model.SerializeToString()
    made = shape_inference.quant_pre_process(model)
    assert model.SerializeToString() == before
    assert isinstance(made, onnx.ModelProto)


@pytest.mark.ort(317, "G24")
def test_arguments_are_checked(tmp_path: Path) -> None:
    model = normalized_conv()
    again = shape_inference.quant_pre_process(input_model_path=model)
    assert model_has_pre_process_metadata(again)
    with pytest.raises(QuantizationError, match="needs input_model"):
        shape_inference.quant_pre_process(None, tmp_path / "o.onnx")
    with pytest.raises(ValueError, match="skip_optimisation"):
        shape_inference.quant_pre_process(model, skip_optimisation=True)
    with pytest.raises(FileNotFoundError):
        shape_inference.quant_pre_process(tmp_path / "none.onnx")


@pytest.mark.ort(318)
def test_upsample_takes_the_same_pixels_as_resize() -> None:
    """onnxruntime's drops the scales of a nameless Upsample, or takes other pixels."""
    text = '(float[1,1,2,3] x) => (float[1,1,4,9] y) { y = Upsample<mode="linear">(x, k) }'
    model = parse(text, {"k": np.array([1, 1, 2, 3], np.float32)}, version=9)
    made = shape_inference.quant_pre_process(model)
    assert [n.op_type for n in made.graph.node] == ["Resize"]
    assert made.opset_import[0].version == 11
    x = random(1, 1, 2, 3)
    np.testing.assert_allclose(outputs(made, x=x)[0], outputs(model, x=x)[0], rtol=1e-6)


@pytest.mark.ort(318)
def test_a_model_that_cannot_be_raised_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    text = "(float[1,1,4,4] x, float[4] k) => (float[] y) { y = Resize(x, k) }"
    made = shape_inference.quant_pre_process(parse(text, {}, version=10))
    assert made.opset_import[0].version == 10
    assert "the opset stays" in caplog.text


@pytest.mark.ort(320)
def test_what_onnxruntime_cannot_run_goes_on_unoptimized(caplog: pytest.LogCaptureFixture) -> None:
    model = parse("(float[2] x) => (float[] y) { a = Relu(x) y = own.Strange(a) }", {})
    model.opset_import.append(helper.make_opsetid("own", 1))
    made = shape_inference.quant_pre_process(model)
    assert [n.op_type for n in made.graph.node] == ["Relu", "Strange"]
    assert set(declared(made)) == {"a"}
    assert "skip_optimization" in caplog.text


@pytest.mark.ort(322)
def test_a_message_without_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(normalized_conv(), path, save_as_external_data=True, size_threshold=10)
    pointed = onnx.load(path, load_external_data=False)
    with pytest.raises(InvalidModelError, match=r"lies in a file.*load it with onnx\.load"):
        shape_inference.quant_pre_process(pointed, tmp_path / "o.onnx")
    made = shape_inference.quant_pre_process(path)
    assert signature(made) == signature(shape_inference.quant_pre_process(normalized_conv()))


@pytest.mark.ort(317, 322)
@pytest.mark.parametrize(
    ("one_file", "location", "files"),
    [
        (True, "weights.bin", ["o.onnx", "weights.bin"]),
        (True, None, ["o.onnx", "o.onnx.data"]),
        (False, None, ["o.onnx", "w"]),
    ],
)
def test_weights_go_where_they_are_told(
    tmp_path: Path, one_file: bool, location: str | None, files: list[str]
) -> None:
    model = parse("(float[1,3,4,4] x) => (float[] y) { y = Conv(x, w, b) }",
                  {"w": random(40, 3, 3, 3), "b": random(40)})  # fmt: skip
    target = tmp_path / "o.onnx"
    shape_inference.quant_pre_process(
        model,
        target,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        external_data_location=location,
        external_data_size_threshold=500,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    x = random(1, 3, 4, 4)
    assert np.array_equal(outputs(target, x=x)[0], outputs(model, x=x)[0])
    with pytest.raises(QuantizationError, match="leaves the folder"):
        shape_inference.quant_pre_process(
            model,
            target,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            external_data_location="../w",
        )


@pytest.mark.ort(322, 275)
def test_models_too_large_for_a_message_are_optimized_through_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimization, "LIMIT", 100)
    made = optimization.optimized(normalized_conv())
    assert [n.op_type for n in made.graph.node] == ["Conv", "Relu"]
    assert made.graph.initializer[0].HasField("raw_data")


@pytest.mark.ort(277)
def test_optimize_model_writes_what_onnxruntime_writes(tmp_path: Path) -> None:
    onnx.save(normalized_conv(), tmp_path / "m.onnx")
    optimization.optimize_model(tmp_path / "m.onnx", tmp_path / "ours.onnx")
    incumbent_utils.optimize_model(tmp_path / "m.onnx", tmp_path / "theirs.onnx")
    ours, theirs = onnx.load(tmp_path / "ours.onnx"), onnx.load(tmp_path / "theirs.onnx")
    assert signature(ours) == signature(theirs)
    assert list(ours.graph.initializer) == list(theirs.graph.initializer)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.ort(324, "G52")
@pytest.mark.parametrize(
    ("given", "parsed"),
    [(["False"], False), (["false"], False), (["0"], False), (["True"], True), ([], True)],
)
def test_a_flag_means_what_it_says(given: list[str], parsed: bool) -> None:
    """onnxruntime's takes '--skip_optimization False' for True."""
    arguments = ["--input", "a", "--output", "b", "--skip_optimization", *given]
    assert preprocess.make_parser().parse_args(arguments).skip_optimization is parsed


@pytest.mark.ort(324)
def test_the_command_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--input", "a", "--output", "b"]
    steps = ["--skip_optimization", "1", "--skip_onnx_shape", "1", "--skip_symbolic_shape", "1"]
    with pytest.raises(SystemExit):
        preprocess.main(both + steps)
    assert "nothing to be done" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        preprocess.main([*both, "--skip_optimization", "perhaps"])
    assert "neither true nor false" in capsys.readouterr().err


@pytest.mark.ort(324, "G52")
def test_the_command_optimizes_and_writes_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime's refuses the two together, although its function can do both."""
    onnx.save(normalized_conv(), tmp_path / "m.onnx")
    command = ["--input", str(tmp_path / "m.onnx"), "--output", str(tmp_path / "o.onnx")]
    command += ["--save_as_external_data", "--all_tensors_to_one_file"]
    command += ["--external_data_location", "w.bin", "--external_data_size_threshold", "100"]
    command += ["--skip_symbolic_shape", "True", "--auto_merge", "--int_max", "9"]
    command += ["--guess_output_rank", "--verbose", "1"]
    run_command(monkeypatch, *command)
    assert not capfd.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "o.onnx", "w.bin"]
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) == 2


@pytest.mark.ort(324, 326, 341)
def test_no_package_imports_the_module_of_a_command() -> None:
    """Else ``python -m`` warns that it runs it twice."""
    code = """import sys, qwrap.ort, qwrap.ort.execution_providers.qnn as qnn
names = ("preprocess", "static_quantize_runner", "execution_providers.qnn.preprocess")
print([name for name in names if "qwrap.ort." + name in sys.modules])"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False
    )
    assert done.stdout.strip() == b"[]", done.stderr
