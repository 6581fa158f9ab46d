"""AWQ through onnxruntime's names, without the packages that its tool needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from nbits_files import attributes, in_floats, model_of, run
from onnx import helper

import qwrap
import qwrap.ort.matmul_nbits_quantizer as ours

pytestmark = pytest.mark.ort(297)


def inputs(count: int) -> list[dict[str, Any]]:
    """Two of 128 inputs are large, as in transformers."""
    rng = np.random.default_rng(7)
    sizes = np.ones(128, np.float32)
    sizes[[3, 70]] = 30
    return [{"x": rng.normal(size=(16, 128)).astype(np.float32) * sizes} for _ in range(count)]


class OwnText(ours.NVAWQWeightOnlyQuantConfig):
    """Inputs of one's own."""

    def get_calib_inputs(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        return inputs(4)


def network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weight = rng.normal(0, 0.1, (128, 64)).astype(np.float32)
    return model_of(nodes, {"w": weight}, {"x": ["B", 128]}, ["y"])


def test_a_model_becomes_pairs_that_are_closer_on_the_data_than_those_of_rounding() -> None:
    source, unseen, errors = network(), inputs(6)[4:], []
    wanted = [run(source, x)[0] for x in unseen]
    plain = {"is_symmetric": True, "quant_format": ours.QuantFormat.QDQ}
    for settings in ({"algo_config": OwnText("tokens")}, plain):
        quantizer = ours.MatMulNBitsQuantizer(source, **settings)
        quantizer.process()
        model = quantizer.model.model
        (pair,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear")
        assert attributes(pair) == {"axis": 0, "block_size": 128}
        assert model.opset_import[0].version >= 21
        got = [run(model, x)[0] for x in unseen]
        for x, y in zip(unseen, got, strict=True):
            np.testing.assert_allclose(run(in_floats(model), x)[0], y, rtol=1e-3, atol=1e-3)
        errors.append(np.mean([np.square(a - b).mean() for a, b in zip(wanted, got, strict=True)]))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.ort("G21")
@pytest.mark.parametrize("method", ["awq_lite", "awq_clip"])
def test_settings_are_honoured(method: str) -> None:
    algo = OwnText("tokens", calibration_method=method)
    quantizer = ours.MatMulNBitsQuantizer(network(), bits=8, block_size=32, algo_config=algo)
    quantizer.process()
    (pair,) = (n for n in quantizer.model.nodes() if n.op_type == "DequantizeLinear")
    assert attributes(pair)["block_size"] == 32
    muls = [n for n in quantizer.model.nodes() if n.op_type == "Mul"]
    assert len(muls) == (method == "awq_lite")  # the input cannot take the divisor back itself
    quantizer = ours.MatMulNBitsQuantizer(network(), nodes_to_exclude=["/h"], algo_config=algo)
    with pytest.warns(qwrap.QwrapWarning, match="no weight was quantized"):
        quantizer.process()
    assert [n.op_type for n in quantizer.model.nodes()] == ["MatMul", "Relu"]
    assert not any(node.quantized for node in quantizer.report.nodes)
    quantizer.nodes_to_exclude = {"/hh"}
    with pytest.raises(ValueError, match="'/hh' does not exist"):
        quantizer.process()


def test_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from awq_lite, awq_clip"):
        OwnText("tokens", calibration_method="awq")


def test_the_inputs_of_a_decoder() -> None:
    config = SimpleNamespace(
        num_key_value_heads=2, hidden_size=64, num_attention_heads=4, num_hidden_layers=2
    )
    made = OwnText("tokens").make_model_input(config, [[5, 6, 7]], [[1, 1, 0]])
    shapes = {name: array.shape for name, array in made.items()}
    empty = {f"past_key_values.{i}.{p}": (1, 2, 0, 16) for i in range(2) for p in ("key", "value")}
    assert shapes == dict.fromkeys(("input_ids", "attention_mask", "position_ids"), (1, 3)) | empty
    assert made["position_ids"].tolist() == [[0, 1, 1]]
    assert made["past_key_values.0.key"].dtype == np.float16


def test_only_known_texts_are_read() -> None:
    class Other(ours.NVAWQWeightOnlyQuantConfig):
        """A text that does not exist."""

    with pytest.raises(ValueError, match='dataset "books" not supported'):
        Other("tokens", dataset_name="books")
