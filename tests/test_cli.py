"""The shell: exit codes, one line for a user's mistake, files where it says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from typer.testing import CliRunner

from qwrap.cli import app
from qwrap.demo import digits, model_path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, image=digits("calibration")[0][:64])
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "digits.int8.onnx"
    done = run("quantize", model_path(), "-o", path, "--calibration", data)
    assert done.exit_code == 0, done.output
    return path


def mistake(done) -> str:
    """Return the one line that reports a mistake, after checking that it is all there is."""
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


# --- what it does


def test_quantize_writes_a_smaller_file_that_reads_the_digits(quantized: Path) -> None:
    images, labels = digits("validation")
    session = onnxruntime.InferenceSession(quantized)
    (logits,) = session.run(None, {"image": images[:500]})
    assert (logits.argmax(1) == labels[:500]).mean() >= 0.97
    assert quantized.stat().st_size <= 0.35 * model_path().stat().st_size


def test_excluded_nodes_keep_their_float_weights(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "q.onnx"
    excluded = ("--exclude", "/head/*", "--exclude", "/narrow/*")
    done = run("quantize", model_path(), "-o", path, "--calibration", data, *excluded)
    assert done.exit_code == 0, done.output
    graph = onnx.load(path).graph
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    weights = {n.name: n.input[1] for n in graph.node if n.op_type in {"Conv", "Gemm"}}
    assert weights["/stem/stem.0/Conv"] in dequantized
    assert not dequantized & {weights["/head/Gemm"], weights["/narrow/narrow.0/Conv"]}


def test_verify_passes_and_writes_json(tmp_path: Path, quantized: Path, data: Path) -> None:
    path = tmp_path / "report.json"
    limits = ("--max-differing", 0, "--min-sqnr", 60, "--json", path)
    done = run("verify", model_path(), quantized, "--data", data, *limits)
    assert done.exit_code == 0, done.output
    assert json.loads(path.read_text(encoding="utf-8"))


def test_verify_beyond_a_limit_exits_1_and_says_which(quantized: Path, data: Path) -> None:
    done = run("verify", model_path(), quantized, "--data", data, "--min-sqnr", 1e6)
    assert done.exit_code == 1
    assert "limit 1000000.0 dB" in done.stderr


def test_inspect_counts_what_onnx_counts() -> None:
    done = run("inspect", model_path(), "--json")
    assert done.exit_code == 0, done.output
    facts, model = json.loads(done.stdout), onnx.load(model_path())
    assert facts["opset"] == {"ai.onnx": 17}
    assert facts["operators"]["Conv"] == sum(n.op_type == "Conv" for n in model.graph.node)
    assert facts["bytes"] == model_path().stat().st_size
    assert facts["inputs"] == [{"name": "image", "type": "float", "shape": ["N", 1, 28, 28]}]
    assert facts["problem"] is None


def test_inspect_prints_shapes_and_the_plan() -> None:
    done = run("inspect", model_path())
    assert done.exit_code == 0, done.output
    assert "image float[N, 1, 28, 28]" in done.stdout
    assert "Conv 7" in done.stdout


def test_demo_leaves_its_files(tmp_path: Path) -> None:
    done = run("demo", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"digits.onnx", "digits.int8.onnx", "calibration.npz"}
    assert str(tmp_path / "out") in done.stdout


@pytest.mark.parametrize("command", ["quantize", "verify", "inspect", "demo"])
def test_every_command_has_help(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout


def test_python_m_qwrap_is_the_shell() -> None:
    command = [sys.executable, "-m", "qwrap", "inspect", "absent.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ModelError: absent.onnx: cannot be read")


# --- what it refuses


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "absent.onnx")
    assert "absent.onnx: cannot be read" in mistake(done)


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("hello")
    done = run("quantize", path, "-o", tmp_path / "q.onnx", "--calibration", data)
    assert "not an ONNX model" in mistake(done)
    assert not (tmp_path / "q.onnx").exists()


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    done = run("quantize", model_path(), "-o", output, "--calibration", tmp_path / "absent")
    assert "absent: no such file or folder" in mistake(done)


def test_arrays_of_another_model_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", image=np.zeros((4, 3, 28, 28), np.float32))
    output = tmp_path / "q.onnx"
    done = run("quantize", model_path(), "-o", output, "--calibration", tmp_path / "d.npz")
    assert "[4, 3, 28, 28]; the model takes [?, 1, 28, 28]" in mistake(done)
    assert not output.exists()


def test_an_unknown_type_is_one_line(tmp_path: Path, data: Path) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--activation", "uint7")
    assert "uint7" in mistake(run("quantize", model_path(), *arguments))


def test_an_unwritable_output_is_one_line(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "q.onnx"  # below a file: no user may write there
    done = run("quantize", model_path(), "-o", output, "--calibration", data)
    assert str(output) in mistake(done) or str(output.parent) in mistake(done)


def test_an_unwritable_demo_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "choose another folder" in mistake(run("demo", "--output", tmp_path / "file" / "out"))


def test_verify_against_a_missing_file_is_one_line(tmp_path: Path, data: Path) -> None:
    done = run("verify", model_path(), tmp_path / "absent.onnx", "--data", data)
    assert "absent.onnx" in mistake(done)


def test_a_missing_option_exits_2() -> None:
    assert run("quantize", model_path()).exit_code == 2
