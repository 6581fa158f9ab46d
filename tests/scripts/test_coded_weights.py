"""Constants that stand as integers are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from coded_weights import coded_values, float_values
from onnx import numpy_helper


def save(path: Path, text: str, **constants: np.ndarray) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 13]> {text}')
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model.graph.initializer.extend(stored)
    onnx.save(model, path)
    return path


def test_codes_and_what_is_quantized_at_once_count(tmp_path: Path) -> None:
    text = """g (float[2,4] x) => (float[2,3] y) {
        w = DequantizeLinear (codes, s)
        q = QuantizeLinear (other, s, z)
        v = DequantizeLinear (q, s, z)
        a = MatMul (x, w)
        b = MatMul (a, v)
        y = Add (b, bias)
    }"""
    path = save(
        tmp_path / "m.onnx",
        text,
        codes=np.zeros((4, 5), np.int8),
        other=np.zeros((5, 3), np.float32),
        bias=np.zeros(3, np.float32),
        s=np.float32(1),
        z=np.int8(0),
    )
    assert coded_values(path) == 4 * 5 + 5 * 3
    assert float_values(path) == 5 * 3 + 3 + 1


def test_constants_of_bodies_and_nodes_count(tmp_path: Path) -> None:
    text = """g (bool c) => (float[2] y) {
        y = If (c) <
            then_branch = t () => (float[2] a) { a = Constant <value = float[2] {1.0, 2.0}> () },
            else_branch = e () => (float[2] b) { b = Constant <value = float[2] {3.0, 4.0}> () }
        >
    }"""
    assert float_values(save(tmp_path / "m.onnx", text)) == 4
