"""QuantizeHelper of the transformers tools."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from qwrap.ort.transformers.quantize_helper import QuantizeHelper, conv1d_to_linear

pytestmark = pytest.mark.ort(367)


class Conv1D(torch.nn.Module):
    """As in Hugging Face's transformers: the weight is that of a Linear, transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = torch.nn.Parameter(torch.randn(nx, nf))
        self.bias = torch.nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Conv1D(6, 8), torch.nn.Sequential(torch.nn.Linear(6, 4))).eval()


def test_conv1d_becomes_the_linear_of_the_same_values() -> None:
    model, x = network(), torch.randn(3, 8)
    want = model(x)
    conv1d_to_linear(model)
    assert isinstance(model[0], torch.nn.Linear)
    torch.testing.assert_close(model(x), want)


def test_a_module_is_quantized_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's replaces layers of the caller's model, and writes to the working directory."""
    monkeypatch.chdir(tmp_path)
    model, x = network(), torch.randn(3, 8)
    made = QuantizeHelper.quantize_torch_model(model)
    assert isinstance(model[0], Conv1D)
    assert "DynamicQuantizedLinear" in repr(made[0])
    assert "DynamicQuantizedLinear" in repr(made[1][0])
    # 8 bits: three rounded operands of some 2^-8 of their range, sums of 8 and 6 products
    assert (made(x) - model(x)).abs().max() < 0.05 * model(x).abs().max()
    assert not os.listdir(tmp_path)


def test_a_file_is_quantized_into_a_folder_that_is_made(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2,8] x) => (float[2,6] y) {
            y = MatMul(x, w) }"""
    )
    rng = np.random.default_rng(3)
    weight = rng.normal(0, 1, (8, 6)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    target = tmp_path / "new" / "q.onnx"
    QuantizeHelper.quantize_onnx_model(str(tmp_path / "m.onnx"), str(target))
    assert "MatMulInteger" in {node.op_type for node in onnx.load(target).graph.node}
    x = rng.normal(0, 1, (2, 8)).astype(np.float32)
    opened = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    assert np.abs(opened.run(None, {"x": x})[0] - x @ weight).max() < 0.1
