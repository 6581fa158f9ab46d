"""The shell: exit codes, one line for a user's mistake, files where it says."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
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


@dataclass
class Done:
    """What one run of ``qwrap quantize`` left behind."""

    path: Path
    stdout: str


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Done:
    path = tmp_path_factory.mktemp("quantized") / "digits.int8.onnx"
    done = run("quantize", model_path(), "-o", path, "--calibration", data, "--verify", 1)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return Done(path, done.stdout)


@pytest.fixture(scope="module")
def quantized_file(quantized: Done) -> Path:
    return quantized.path


def mistake(done) -> str:
    """Return the one line that reports a mistake, after checking that it is all there is."""
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    return line


# --- what it does


def test_quantize_writes_a_smaller_file_that_reads_the_digits(quantized_file: Path) -> None:
    images, labels = digits("validation")
    session = onnxruntime.InferenceSession(quantized_file)
    (logits,) = session.run(None, {"image": images[:500]})
    assert (logits.argmax(1) == labels[:500]).mean() >= 0.97
    assert quantized_file.stat().st_size <= 0.35 * model_path().stat().st_size


def test_excluded_nodes_keep_their_float_weights(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "q.onnx"
    excluded = ("--exclude", "/head/*", "--exclude", "/narrow/*", "--verify", 0)
    done = run("quantize", model_path(), "-o", path, "--calibration", data, *excluded)
    assert done.exit_code == 0, done.output
    graph = onnx.load(path).graph
    dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    weights = {n.name: n.input[1] for n in graph.node if n.op_type in {"Conv", "Gemm"}}
    assert weights["/stem/stem.0/Conv"] in dequantized
    assert not dequantized & {weights["/head/Gemm"], weights["/narrow/narrow.0/Conv"]}


def test_set_gives_nodes_other_types_and_converts_between(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "q.onnx"
    asked = ("--set", "/separable/separable.3/*=uint16", "--set", "/stem/*=/int4", "--verify", 0)
    done = run("quantize", model_path(), "-o", path, "--calibration", data, *asked)
    assert done.exit_code == 0, done.output
    assert "converted" in done.stdout
    graph = onnx.load(path).graph
    codes = {i.name: i.data_type for i in graph.initializer}
    made = {n.output[0]: n for n in graph.node}
    types = {
        node.name: [codes[made[node.input[0]].input[2]], codes[made[node.input[1]].input[0]]]
        for node in graph.node
        if node.op_type in {"Conv", "Gemm"}
    }
    uint8, int8, uint16, int4 = 2, 3, 4, 22
    assert types["/separable/separable.3/Conv"] == [uint16, int8]
    assert types["/stem/stem.0/Conv"] == [uint8, int4]
    assert types["/head/Gemm"] == [uint8, int8]


@pytest.mark.parametrize("target", ["qnn", "tensorrt", "openvino", "vitisai"])
def test_a_file_for_another_target_reads_the_digits(
    tmp_path: Path, data: Path, target: str
) -> None:
    path = tmp_path / "q.onnx"
    asked = ("--calibration", data, "--target", target, "--verify", 1)
    done = run("quantize", model_path(), "-o", path, *asked)
    assert done.exit_code == 0, done.output
    images, labels = digits("validation")
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"image": images[:200]})
    assert (logits.argmax(1) == labels[:200]).mean() >= 0.95
    types = {i.data_type for i in onnx.load(path).graph.initializer if i.name.endswith("_point")}
    uint8, int8, int32 = 2, 3, 6
    signed = target in ("tensorrt", "vitisai")
    assert types - {int32} == ({int8} if signed else {uint8, int8})


def test_a_type_that_a_target_lacks_is_a_mistake(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "q.onnx"
    asked = ("--calibration", data, "--target", "tensorrt", "--activation", "uint8")
    done = run("quantize", model_path(), "-o", path, *asked)
    assert "target 'tensorrt' runs" in mistake(done)
    assert not path.exists()


@pytest.mark.parametrize("text", ["/head/*", "=uint16", "/head/*=", "/head/*=/"])
def test_a_region_that_says_nothing_is_a_mistake(tmp_path: Path, text: str) -> None:
    done = run("quantize", model_path(), "-o", tmp_path / "q.onnx", "--set", text)
    assert f"--set '{text}'" in mistake(done)


def test_a_region_of_unknown_nodes_is_a_mistake_with_the_nearest_name(
    tmp_path: Path, data: Path
) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--set", "/haed/Gemm=uint16")
    assert "'/head/Gemm'" in mistake(run("quantize", model_path(), *arguments))


def test_quantize_shows_the_plan_and_how_close_the_simulation_is(quantized: Done) -> None:
    for line in ("integer    Add 1, Conv 7, Gemm 1", "absorbed   Clip 3, Relu 4"):
        assert line in quantized.stdout
    assert re.search(
        r"exact simulation, .* SQNR inf dB, .* 100\.00%; 0 of \d{7} codes differ", quantized.stdout
    )


def test_quantize_beyond_a_limit_exits_1_and_says_which(tmp_path: Path, data: Path) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--verify", 1)
    done = run("quantize", model_path(), *arguments, "--max-differing", 0, "--min-sqnr", 1e6)
    assert done.exit_code == 1
    assert re.fullmatch(r"SQNR: \d\d\.\d dB, limit 1000000\.0 dB\n", done.stderr)


def test_quiet_prints_nothing(tmp_path: Path, data: Path) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--verify", 1, "--quiet")
    done = run("quantize", model_path(), *arguments, "--limit", 16)
    assert (done.exit_code, done.output) == (0, "")


def test_finetune_trains_on_the_calibration_data(tmp_path: Path, data: Path) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--verify", 8, "--limit", 48)
    done = run("quantize", model_path(), *arguments, "--finetune", 3)
    assert done.exit_code == 0, done.output
    assert "fine-tuned for 3 steps" in done.stdout
    assert "on 3 batches" in done.stdout  # each verified once, however often it was read
    assert "0 of" in done.stdout


def test_effort_says_what_is_done_behind_calibration(tmp_path: Path, data: Path) -> None:
    arguments = ["-o", tmp_path / "q.onnx", "--calibration", data, "--weight", "int4"]
    done = run("quantize", model_path(), *arguments, "--effort", "none", "--verify", 0)
    assert done.exit_code == 0
    assert "held-back error" not in done.stdout
    done = run("quantize", model_path(), *arguments, "--verify", 0)
    assert done.exit_code == 0
    assert "GPTQ rounding, held-back error" in done.stdout
    assert run("quantize", model_path(), *arguments, "--effort", "much").exit_code == 2


def test_the_guard_returns_layers_to_float(tmp_path: Path, data: Path) -> None:
    arguments = ["-o", tmp_path / "q.onnx", "--calibration", data, "--weight", "int2"]
    for guard, raised in (("30", True), ("-inf", False)):
        done = run("quantize", model_path(), *arguments, "--guard", guard, "--verify", 0)
        assert done.exit_code == 0
        assert ("layers raised" in done.stdout) == raised


def test_weights_alone_are_quantized_without_data(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    arguments = ("--activation", "none", "--weight", "int4", "--block-size", 16)
    done = run("quantize", model_path(), "-o", path, *arguments)
    assert done.exit_code == 0, done.output
    assert "weights    Conv 7, Gemm 1" in done.stdout
    nodes = onnx.load(path).graph.node
    assert not [n for n in nodes if n.op_type == "QuantizeLinear"]
    sizes = [a.i for n in nodes for a in n.attribute if a.name == "block_size"]
    assert sizes
    assert set(sizes) == {16}


def test_integers_of_odd_widths_go_by_name(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "q.onnx"
    arguments = ("--activation", "uint5", "--weight", "int3", "--limit", 16, "--max-differing", 0)
    done = run("quantize", model_path(), "-o", path, "--calibration", data, *arguments)
    assert done.exit_code == 0, done.output
    names = sorted(f.name for f in onnx.load(path).functions)
    assert names == ["DequantizeInt3", "FakeQuantizeUint5"]


def test_contrib_operators_leave_the_opset_as_it_is(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "q.onnx"
    arguments = ("--activation", "uint16", "--contrib", "--verify", 0, "--limit", 16)
    done = run("quantize", model_path(), "-o", path, "--calibration", data, *arguments)
    assert done.exit_code == 0, done.output
    opsets = [
        {o.domain: o.version for o in onnx.load(p).opset_import} for p in (model_path(), path)
    ]
    assert opsets[1] == {**opsets[0], "com.microsoft": 1}


def test_options_reach_the_ranges(tmp_path: Path, data: Path) -> None:
    options = {
        "minmax": ("--method", "minmax"),
        "percentile": ("--method", "percentile", "--percentile", 99),
        "per tensor": ("--method", "minmax", "--no-per-channel"),
        "weights": ("--method", "minmax", "--weight-method", "minmax"),
    }
    scales = {}
    for name, chosen in options.items():
        path = tmp_path / "q.onnx"
        arguments = ("-o", path, "--calibration", data, "--verify", 0, "--limit", 32, *chosen)
        done = run("quantize", model_path(), *arguments)
        assert done.exit_code == 0, done.output
        model = onnx.load(path)
        names = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        held = [t for t in model.graph.initializer if t.name in names]
        scales[name] = {t.name: onnx.numpy_helper.to_array(t) for t in held}
    assert len({str(sorted(found.items())) for found in scales.values()}) == len(options)
    assert sum(scale.size for scale in scales["per tensor"].values()) == len(scales["per tensor"])


def test_batch_size_and_limit_say_what_is_verified(tmp_path: Path, data: Path) -> None:
    arguments = ("--calibration", data, "--batch-size", 5, "--limit", 20, "--verify", 3)
    done = run("quantize", model_path(), "-o", tmp_path / "q.onnx", *arguments)
    assert "on 3 batches of the calibration data" in done.stdout


def test_statistics_are_made_once_and_read_then(tmp_path: Path, data: Path) -> None:
    file, outputs = tmp_path / "s.json", [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for output in outputs:
        arguments = ("-o", output, "--calibration", data, "--statistics", file, "--verify", 1)
        done = run("quantize", model_path(), *arguments)
        assert done.exit_code == 0, done.output
        assert "verified against onnxruntime on 1 batch" in done.stdout
    assert json.loads(file.read_text(encoding="utf-8"))["batches"] == 4  # not 8
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_table_stands_for_data(tmp_path: Path, data: Path) -> None:
    first, second, table = (tmp_path / name for name in ("a.onnx", "b.onnx", "t"))
    arguments = ("--calibration", data, "--write-table", table, "--table-form", "qnn")
    done = run("quantize", model_path(), "-o", first, *arguments, "--verify", 0)
    assert done.exit_code == 0, done.output
    done = run("quantize", model_path(), "-o", second, "--table", table)
    assert done.exit_code == 0, done.output
    assert "not verified: without --calibration" in done.stdout
    assert scales(first) == scales(second) != {}


def scales(path: Path) -> dict[str, bytes]:
    """Every scale in a file, but those of biases, by name."""
    initializers = onnx.load(path).graph.initializer
    found = {i.name: onnx.numpy_helper.to_array(i).tobytes() for i in initializers}
    return {n: value for n, value in found.items() if "scale" in n and "bias" not in n}


def test_statistics_stand_for_data(tmp_path: Path, data: Path) -> None:
    file, output = tmp_path / "s.safetensors", tmp_path / "q.onnx"
    arguments = ("--statistics", file, "--verify", 0)
    run("quantize", model_path(), "-o", output, "--calibration", data, *arguments)
    done = run("quantize", model_path(), "-o", output, "--statistics", file, "--method", "entropy")
    assert done.exit_code == 0, done.output
    assert "not verified: without --calibration there is no data to run" in done.stdout
    assert "no data to improve them by" in done.stdout
    images, labels = digits("validation")
    (logits,) = onnxruntime.InferenceSession(output).run(None, {"image": images[:500]})
    assert (logits.argmax(1) == labels[:500]).mean() >= 0.95


def test_verify_passes_and_writes_json(tmp_path: Path, quantized_file: Path, data: Path) -> None:
    path = tmp_path / "report.json"
    # The optimised kernels round once where the file as written rounds twice: some in 10 000.
    limits = ("--max-differing", 1e-3, "--min-sqnr", 40, "--json", path)
    done = run("verify", model_path(), quantized_file, "--data", data, *limits)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["batches"] == 4
    assert report["quantization"][0]["name"] == "logits"


def test_verify_agrees_with_onnxruntime(tmp_path: Path, quantized_file: Path, data: Path) -> None:
    path = tmp_path / "report.json"
    run("verify", model_path(), quantized_file, "--data", data, "--json", path)
    images = np.load(data)["image"]
    files = (model_path(), quantized_file)
    reference, ours = (
        onnxruntime.InferenceSession(file).run(None, {"image": images})[0].astype(np.float64)
        for file in files
    )
    sqnr = 10 * np.log10((reference**2).sum() / ((ours - reference) ** 2).sum())
    found = json.loads(path.read_text(encoding="utf-8"))["sqnr"]
    assert found == pytest.approx(sqnr, abs=0.01)  # batches of 16 there, one of 64 here


def test_verify_beyond_a_limit_exits_1_and_says_which(quantized_file: Path, data: Path) -> None:
    done = run("verify", model_path(), quantized_file, "--data", data, "--min-sqnr", 1e6)
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
    assert "integer    Add 1, Conv 7, Gemm 1, GlobalAveragePool 1" in done.stdout


def test_inspect_says_why_a_model_cannot_be_quantized(tmp_path: Path) -> None:
    model = onnx.load(model_path())
    model.graph.node[0].op_type = "Convolve"
    onnx.save(model, tmp_path / "odd.onnx")
    done = run("inspect", tmp_path / "odd.onnx")
    assert done.exit_code == 0, done.output
    assert re.search(r"cannot be quantized: .*Convolve", done.stdout)


def inspected(text: str, path: Path) -> tuple[dict, str]:
    """What inspect says of a model in ONNX's text form, as facts and as text."""
    onnx.save(onnx.parser.parse_model(text), path)
    done, facts = run("inspect", path), run("inspect", path, "--json")
    assert done.exit_code == facts.exit_code == 0, done.output
    return json.loads(facts.stdout), done.stdout


def test_inspect_lists_functions_and_counts_what_they_hold(tmp_path: Path) -> None:
    facts, text = inspected(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[2] x) => (float[2] y)
        { a = local.twice(x) y = local.twice(a) }
        <domain: "local", opset_import: ["": 17]> twice (x) => (y) { y = Add(x, x) }""",
        tmp_path / "m.onnx",
    )
    assert facts["functions"] == ["local::twice"]
    assert facts["operators"] == {"local::twice": 2, "Add": 1}
    assert sum(node["op_type"] == "Add" for node in facts["plan"]["nodes"].values()) == 2
    assert "functions   local::twice" in text


def test_inspect_tells_sequences_from_tensors(tmp_path: Path) -> None:
    facts, text = inspected(
        """<ir_version: 8, opset_import: ["": 15]> g (seq(float[N]) x) => (float[M] y)
        { y = ConcatFromSequence<axis: int = 0>(x) }""",
        tmp_path / "m.onnx",
    )
    assert facts["inputs"] == [{"name": "x", "type": "sequence of float", "shape": ["N"]}]
    assert "x sequence of float[N]" in text


def test_inspect_notes_what_onnxruntime_computes(tmp_path: Path) -> None:
    facts, text = inspected(
        """<ir_version: 8, opset_import: ["": 15, "com.microsoft": 1]>
        g (string[N] x) => (string[N,M] y) { y = com.microsoft.Tokenizer<
        mark: int = 0, pad_value = "#", separators = [" "], mincharnum: int = 1>(x) }""",
        tmp_path / "m.onnx",
    )
    assert ["gradients stop there" in note for note in facts["notes"]] == [True]
    assert "note        nodes ['Tokenizer:y'] are computed by onnxruntime" in text


def test_inspect_says_what_is_quantized_already(quantized_file: Path) -> None:
    nodes = onnx.load(quantized_file).graph.node
    count = sum(node.op_type == "QuantizeLinear" for node in nodes)
    done = run("inspect", quantized_file)
    assert done.exit_code == 0, done.output
    assert re.search(rf"note +quantized already: .*\bQuantizeLinear {count}\b", done.stdout)
    assert "Conv: its weight is quantized already" in done.stdout


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


def test_neither_data_nor_statistics_is_one_line(tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    done = run("quantize", model_path(), "-o", output)
    assert "give --calibration DATA, --statistics or --table FILE with ranges" in mistake(done)
    done = run("quantize", model_path(), "-o", output, "--statistics", tmp_path / "absent")
    assert "give calibration data, statistics that exist, or a table" in mistake(done)
    done = run("quantize", model_path(), "-o", output, "--statistics", tmp_path, "--min-sqnr", 9)
    assert "no --calibration leaves nothing to hold" in mistake(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "absent"), "TableError: absent: cannot be read: No such file"),
        (("--table", "x", "--write-table", "t"), "--write-table and --table-form go together"),
        (("--table", "x", "--write-table", "t", "--table-form", "y"), "choose one of onnxruntime,"),
        (("--table", "x", "--write-table", "no/t", "--table-form", "qnn"), "does not exist; make"),
        (("--table", "x", "--min-sqnr", 9), "no --calibration leaves nothing to hold"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path: Path, arguments, message: str) -> None:
    done = run("quantize", model_path(), "-o", tmp_path / "q.onnx", *arguments)
    assert message in mistake(done)


def test_a_table_that_lacks_tensors_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t").write_text('{"image": [0, 1]}')
    done = run("quantize", model_path(), "-o", tmp_path / "q.onnx", "--table", tmp_path / "t")
    assert "NotCalibratedError: neither the table nor calibration has seen" in mistake(done)
    assert not (tmp_path / "q.onnx").exists()


def test_statistics_of_another_model_are_one_line(tmp_path: Path, data: Path, small) -> None:
    file, output = tmp_path / "s.json", tmp_path / "q.onnx"
    onnx.save(small.convs(), tmp_path / "other.onnx")
    np.save(tmp_path / "d.npy", small.batches(1)[0])
    arguments = ("--calibration", tmp_path / "d.npy", "--statistics", file, "--verify", 0)
    done = run("quantize", tmp_path / "other.onnx", "-o", output, *arguments, "--scope", "kernels")
    assert done.exit_code == 0, done.output
    before = file.read_bytes()
    done = run("quantize", model_path(), "-o", output, "--calibration", data, "--statistics", file)
    line = mistake(done)
    assert (
        f"{file}: the statistics are of another model: input 'image' float[N,1,28,28] here" in line
    )
    assert file.read_bytes() == before
    file.write_text("{}")
    done = run("quantize", model_path(), "-o", output, "--calibration", data, "--statistics", file)
    assert f"{file}: holds no statistics of qwrap" in mistake(done)


def test_an_unknown_type_is_one_line(tmp_path: Path, data: Path) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--activation", "uint99")
    assert "uint99" in mistake(run("quantize", model_path(), *arguments))


def test_an_unwritable_output_is_one_line(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "q.onnx"  # below a file: no user may write there
    done = run("quantize", model_path(), "-o", output, "--calibration", data, "--limit", 16)
    assert str(output) in mistake(done)


def test_the_model_itself_as_output_is_one_line(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copyfile(model_path(), path)
    done = run("quantize", path, "-o", path, "--calibration", data)
    assert mistake(done).startswith(f"ExportError: {path}: is the float model itself")
    assert path.read_bytes() == model_path().read_bytes()


BAD_ARRAYS = {
    "wrong names": (
        {name: np.zeros((4, 1, 28, 28), np.float32) for name in ("picture", "mask")},
        "'image'",
    ),
    "no samples": ({"image": np.zeros((0, 1, 28, 28), np.float32)}, "no samples"),
    "NaN": ({"image": np.full((4, 1, 28, 28), np.nan, np.float32)}, "NaN or infinite"),
    "integers": ({"image": np.zeros((4, 1, 28, 28), np.uint8)}, "got uint8"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_arrays_that_cannot_be_used_are_one_line(tmp_path: Path, kind: str) -> None:
    arrays, said = BAD_ARRAYS[kind]
    np.savez(tmp_path / "d.npz", **arrays)
    output = tmp_path / "q.onnx"
    done = run("quantize", model_path(), "-o", output, "--calibration", tmp_path / "d.npz")
    assert said in mistake(done)
    assert not output.exists()


def test_a_truncated_model_is_one_line(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(model_path().read_bytes()[:300_000])
    done = run("quantize", path, "-o", tmp_path / "q.onnx", "--calibration", data)
    assert "half.onnx" in mistake(done)


def test_an_unknown_preset_is_one_line(tmp_path: Path, data: Path) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, "--preset", "imagnet")
    assert "imagnet" in mistake(run("quantize", model_path(), *arguments))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--method", "entropie", "method='entropie': choose one of"),
        ("--weight-method", "percentile", "weight_method='percentile': choose one of"),
        ("--percentile", 30, "percentile=30.0: expected"),
        ("--exclude", "/tail/*", "/tail/*"),
        ("--limit", 0, "limit=0"),
        ("--verify", "0 --max-differing 0", "--verify 0 leaves nothing"),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_line(
    tmp_path: Path, data: Path, option: str, value: object, said: str
) -> None:
    arguments = ("-o", tmp_path / "q.onnx", "--calibration", data, option, *str(value).split())
    assert said in mistake(run("quantize", model_path(), *arguments))


def test_a_report_that_cannot_be_written_is_one_line(
    tmp_path: Path, quantized_file: Path, data: Path
) -> None:
    arguments = ("--data", data, "--quiet", "--json", tmp_path / "absent" / "report.json")
    done = run("verify", model_path(), quantized_file, *arguments)
    assert "report.json: cannot be written" in mistake(done)


def test_an_unwritable_demo_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "choose another folder" in mistake(run("demo", "--output", tmp_path / "file" / "out"))


def test_verify_against_a_missing_file_is_one_line(tmp_path: Path, data: Path) -> None:
    done = run("verify", model_path(), tmp_path / "absent.onnx", "--data", data)
    assert "absent.onnx" in mistake(done)


def test_a_missing_option_exits_2() -> None:
    assert run("quantize", model_path()).exit_code == 2


# --- search --------------------------------------------------------------------------------------


def test_search_writes_a_file_within_the_budget(data: Path, tmp_path: Path) -> None:
    output, report, plot = (tmp_path / name for name in ("best.onnx", "report.json", "front.svg"))
    ask = ("search", model_path(), "-o", output, "--calibration", data, "--limit", 32)
    files = ("--resume", tmp_path / "state.json", "--json", report, "--plot", plot)
    done = run(*ask, "--budget", "bytes=40%", "--points", 2, *files)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("bytes=40%: ")
    assert done.stdout.splitlines()[-1].startswith(f"{output}: ")
    assert output.stat().st_size < 0.45 * model_path().stat().st_size  # and the graph itself
    chosen = json.loads(report.read_text())
    assert chosen["points"][chosen["chosen"]]["costs"]["bytes"] <= 0.4 * model_path().stat().st_size
    assert plot.stat().st_size > 0
    onnxruntime.InferenceSession(output)
    again = run(*ask, "--budget", "bytes=40%", "--points", 2, *files)
    assert again.stdout == done.stdout


def test_search_refuses_what_makes_no_sense(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "best.onnx"
    ask = ("search", model_path(), "-o", output, "--calibration", data, "--limit", 32)
    assert "give a budget" in mistake(run(*ask))
    assert "no choice of types is within bytes of 9" in mistake(run(*ask, "--budget", "bytes=9 B"))
    assert "by='row'" in mistake(run(*ask, "--budget", "bytes=50%", "--by", "row"))
    wrong = ("--budget", "bytes=50%", "--metric", "accuracy")
    assert "--metric accuracy: expected 'none'" in mistake(run(*ask, *wrong))
    same = (
        "search",
        model_path(),
        "-o",
        model_path(),
        "--calibration",
        data,
        "--budget",
        "bytes=1",
    )
    assert "is the float model itself" in mistake(run(*same))
    assert not output.exists()


def test_search_goes_by_a_metric_of_the_user(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def score(model):\n    return 0.5 if model.plan else 1.0\n"
    (tmp_path / "scores.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "best.onnx"
    ask = ("search", model_path(), "-o", output, "--calibration", data, "--limit", 32)
    wish = ("--max-drop", 0.5, "--along", "bytes", "--points", 2, "--metric", "scores:score")
    done = run(*ask, *wish)
    assert done.exit_code == 0, done.output
    assert "float model: metric 1" in done.stdout
