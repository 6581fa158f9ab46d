"""``python -m qwrap.ort.matmul_nbits_quantizer``."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.matmul_nbits_quantizer as incumbent
import pytest
from nbits_files import attributes, drawn, model_of, product, run
from onnx import helper

import qwrap
import qwrap.ort.matmul_nbits_quantizer as ours

pytestmark = pytest.mark.ort(300)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(2)]
    weights = {f"w{i}": drawn(64, 64, seed=i) for i in range(2)}
    onnx.save(model_of(nodes, weights, {"h0": ["B", 64]}, ["h2"]), tmp_path / "m.onnx")
    return str(tmp_path / "m.onnx"), str(tmp_path / "q.onnx")


def called(files: tuple[str, str], *arguments: str) -> list[dict[str, Any]]:
    ours.main(["--input_model", files[0], "--output_model", files[1], *arguments])
    run(files[1], {"h0": drawn(3, 64)})
    model = onnx.load(files[1])
    return [attributes(n) | {"inputs": len(n.input), "type": n.op_type} for n in model.graph.node]


def test_it_has_the_incumbents_flags() -> None:
    flags = re.findall(r'"(--\w+)"', inspect.getsource(incumbent.parse_args))
    parsed = vars(ours.parse_args(["--input_model", "a", "--output_model", "b"]))
    assert {flag[2:] for flag in flags} <= parsed.keys()
    assert parsed["block_size"] == 32
    assert parsed["symmetric"] is True


@pytest.mark.ort("G21")
@pytest.mark.parametrize("method", ["default", "rtn", "k_quant", "hqq"])
def test_settings_reach_every_method(files: tuple[str, str], method: str) -> None:
    """onnxruntime's command hands block size, symmetry and bits to some methods only."""
    nodes = called(
        files,
        "--quant_method",
        method,
        "--block_size",
        "16",
        "--bits",
        "8",
        "--accuracy_level",
        "1",
    )
    for node in nodes:
        assert (node["block_size"], node["bits"], node["accuracy_level"]) == (16, 8, 1)
        assert node["inputs"] == (4 if method in ("k_quant", "hqq") else 3)


def test_symmetry_exclusions_and_form(files: tuple[str, str]) -> None:
    nodes = called(
        files, "--symmetric", "False", "--nodes_to_exclude", "/h2", "--quant_format", "QDQ"
    )
    assert [n["type"] for n in nodes] == ["DequantizeLinear", "MatMul", "MatMul"]
    assert nodes[0]["inputs"] == 3


@pytest.mark.ort("G20")
def test_included_nodes_are_the_only_ones(files: tuple[str, str]) -> None:
    nodes = called(files, "--nodes_to_include", "/h2")
    assert [n["type"] for n in nodes] == ["MatMul", "MatMulNBits"]


@pytest.mark.ort(296)
def test_gptq_reads_data(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --calibration_data"):
        called(files, "--quant_method", "gptq")
    np.savez(tmp_path / "data.npz", h0=drawn(32, 64, seed=5))
    nodes = called(
        files, "--quant_method", "gptq", "--calibration_data", str(tmp_path / "data.npz")
    )
    assert [n["block_size"] for n in nodes] == [32, 32]


def test_tables_and_axes(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["w", "i"], ["y"])]
    model = model_of(nodes, {"w": drawn(64, 40)}, {"i": ["B"]}, ["y"], integers=["i"])
    onnx.save(model, tmp_path / "m.onnx")
    ours.main([
        *("--input_model", str(tmp_path / "m.onnx"), "--output_model", str(tmp_path / "q.onnx")),
        *("--op_types_to_quantize", "MatMul", "Gather", "--quant_axes", "MatMul:0", "Gather:0"),
    ])
    (node,) = onnx.load(tmp_path / "q.onnx").graph.node
    assert attributes(node)["quantize_axis"] == 0


def test_an_output_that_exists_stays(files: tuple[str, str]) -> None:
    Path(files[1]).write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="already exists"):
        ours.main(["--input_model", files[0], "--output_model", files[1]])
    assert Path(files[1]).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("method", ["hqq", "rtn", "k_quant", "gptq"])
def test_methods_without_pairs_say_so(files: tuple[str, str], method: str) -> None:
    with pytest.raises(ValueError, match="only supports QOperator format"):
        called(files, "--quant_method", method, "--quant_format", "QDQ")


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    onnx.save(product(drawn(64, 24)), tmp_path / "m.onnx")
    module = "qwrap.ort.matmul_nbits_quantizer"
    command = [sys.executable, "-m", module, "--input_model", "m.onnx", "--output_model", "q.onnx"]
    path = {**os.environ, "PYTHONPATH": str(Path(qwrap.__file__).parents[1])}
    done = subprocess.run(
        [*command, "-v"], cwd=tmp_path, env=path, check=True, capture_output=True, text=True
    )
    assert done.stdout == ""
    assert "1 of 1 nodes quantized" in done.stderr
    assert onnx.load(tmp_path / "q.onnx").graph.node[0].op_type == "MatMulNBits"


def test_texts_become_settings() -> None:
    assert [ours.ort_convert_str_to_bool(t) for t in ("true", "1", "True", "no")] == [
        *(True, True, True),
        False,
    ]
    assert ours.parse_key_value_pair("Gather:1") == ("Gather", 1)
