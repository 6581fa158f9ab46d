"""``quantize`` with a weight-only configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nbits_files import attributes, drawn, in_floats, product, run

import qwrap.ort.matmul_nbits_quantizer as nbits
from qwrap import ort

pytestmark = pytest.mark.ort(26, 299)


class Reader:
    def __init__(self) -> None:
        self.batches = [{"x": drawn(8, 128, seed=i)} for i in range(4)]

    def get_next(self) -> dict[str, Any] | None:
        return self.batches.pop() if self.batches else None

    def __iter__(self) -> Any:
        return iter(self.get_next, None)


CONFIGS = {
    "DEFAULT": lambda: nbits.DefaultWeightOnlyQuantConfig(),
    "QDQ": lambda: nbits.DefaultWeightOnlyQuantConfig(quant_format=ort.QuantFormat.QDQ),
    "HQQ": lambda: nbits.HQQWeightOnlyQuantConfig(),
    "RTN": lambda: nbits.RTNWeightOnlyQuantConfig(),
    "k_quant": lambda: nbits.KQuantWeightOnlyQuantConfig(),
    "GPTQ": lambda: nbits.GPTQWeightOnlyQuantConfig(Reader()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_writes_external_data(name: str, tmp_path: Path) -> None:
    source, target = product(drawn(128, 64)), tmp_path / "q.onnx"
    before, report = source.SerializeToString(), ort.Report()
    assert ort.quantize(source, target, CONFIGS[name](), report=report) is None
    assert source.SerializeToString() == before
    inside = onnx.load(target, load_external_data=False).graph.initializer
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in inside)
    model, x = onnx.load(target), {"x": drawn(3, 128, seed=9)}
    (wanted,), (got,) = run(in_floats(model), x), run(str(target), x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert attributes(model.graph.node[0])["block_size"] == 128
    assert [n.quantized for n in report.nodes] == [True]


def test_without_an_output_the_model_comes_back(tmp_path: Path) -> None:
    onnx.save(product(drawn(128, 64)), tmp_path / "m.onnx")
    model = ort.quantize(str(tmp_path / "m.onnx"), None, CONFIGS["DEFAULT"]())
    assert model is not None
    assert [n.op_type for n in model.graph.node] == ["MatMulNBits"]


def test_anything_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="WeightOnlyQuantConfig"):
        ort.quantize(product(drawn(128, 64)), None, object())
