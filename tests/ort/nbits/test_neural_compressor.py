"""The names of neural_compressor, beside the incumbent's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.neural_compressor.util as incumbent_util
import onnxruntime.quantization.neural_compressor.weight_only as incumbent
import pytest
import torch
from nbits_files import attributes, constants, drawn, in_floats, matrix, model_of, product, run
from onnx import helper

import qwrap.ort.neural_compressor.weight_only as ours
from qwrap.ort.neural_compressor import gptq_quantize, rtn_quantize, util
from qwrap.ort.neural_compressor.onnx_model import ONNXModel

NAMES = [
    *("make_matmul_weight_only_node", "quant_tensor", "quant_tensor_k_quant_cpu"),
    *("quant_tensor_k_quant_cuda", "qdq_tensor", "pad_tensor", "rtn_quantize"),
    *("get_weight_scale", "prepare_inputs", "gptq", "gptq_quantize"),
]


def chain(count: int = 3) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(count)]
    weights = {f"w{i}": drawn(64, 64, seed=i) for i in range(count)}
    return model_of(nodes, weights, {"h0": ["B", 64]}, [f"h{count}"])


@pytest.mark.ort(294, 295, 296, 362)
@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str) -> None:
    a, b = (inspect.signature(getattr(m, name)).parameters for m in (ours, incumbent))
    assert list(a) == list(b)
    defaults = [[p.default for p in each.values()] for each in (a, b)]
    assert [list(d) if isinstance(d, tuple) else d for d in defaults[0]] == defaults[1]


@pytest.mark.ort(294)
@pytest.mark.parametrize("ratio", [1.0, 0.9])
@pytest.mark.parametrize("dtype", ["int", "uint"])
@pytest.mark.parametrize("scheme", ["sym", "asym"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_of_a_tensor(bits: int, scheme: str, dtype: str, ratio: float) -> None:
    data = drawn(16, 96)
    data[0] = 0
    given = (data, bits, 32, scheme, dtype, ratio)
    for x, y in zip(ours.quant_tensor(*given), incumbent.quant_tensor(*given), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-6)
    np.testing.assert_allclose(ours.qdq_tensor(*given), incumbent.qdq_tensor(*given), rtol=1e-5)


@pytest.mark.ort(294)
def test_groups_on_one_side_of_zero() -> None:
    """onnxruntime's zero point is cut off there, and the codes saturate."""
    data = np.random.default_rng(0).uniform(1, 2, (4, 32)).astype(np.float32)
    errors = [np.abs(m.qdq_tensor(data, dtype="uint") - data).max() for m in (ours, incumbent)]
    assert errors[0] <= 2 / 15 / 2 * 1.001
    assert errors[1] > 0.5


@pytest.mark.ort(295)
def test_k_quant_of_a_tensor() -> None:
    data, errors = drawn(16, 96), []
    for function in (ours.quant_tensor_k_quant_cpu, incumbent.quant_tensor_k_quant_cpu):
        codes, scale, zero_point = function(data, 4, 32)
        assert (codes.shape, scale.shape, zero_point.shape) == ((48, 32), (48, 1), (48, 1))
        assert (codes.dtype, scale.dtype, zero_point.dtype) == (float, float, np.uint8)
        meant = (codes - zero_point) * scale
        errors.append(np.square(meant.reshape(16, 96) - data).mean())
    assert errors[0] <= errors[1] * 1.02
    again = ours.quant_tensor_k_quant_cuda(data, 4, 32)
    np.testing.assert_array_equal(again[0], ours.quant_tensor_k_quant_cpu(data, 4, 32)[0])


@pytest.mark.ort(294)
def test_helpers_of_weights() -> None:
    weight = drawn(40, 8)
    for size in (-1, 32):
        np.testing.assert_array_equal(
            ours.pad_tensor(weight, size, 2), incumbent.pad_tensor(weight, size, 2)
        )
    for size in (-1, 4):
        np.testing.assert_allclose(
            ours.get_weight_scale(weight, size), incumbent.get_weight_scale(weight, size)
        )


@pytest.mark.ort(281, 294)
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_node_and_what_it_reads(bits: int, level: int) -> None:
    node = product(drawn(64, 24)).graph.node[0]
    codes, scale, zero = incumbent.quant_tensor(drawn(24, 64), bits, 32, "asym", "uint")
    given = ([64, 24], bits, 32, 2, codes.astype("uint8"), scale.astype(np.float32), zero, level)
    (a, tensors), (b, others) = (
        m.make_matmul_weight_only_node(node, *given) for m in (ours, incumbent)
    )
    assert (a.name, list(a.input), list(a.output)) == (b.name, list(b.input), list(b.output))
    assert attributes(a) == attributes(b)
    by_name = [{t.name: (t.dims, t.data_type, t.raw_data) for t in ts} for ts in (tensors, others)]
    assert by_name[0] == by_name[1]


@pytest.mark.ort(294)
def test_an_odd_number_of_groups() -> None:
    """onnxruntime packs zero points of two outputs into one byte, and fails."""
    node = product(drawn(96, 5)).graph.node[0]
    codes, scale, zero = incumbent.quant_tensor(drawn(5, 96), 4, 32, "asym", "uint")
    given = ([96, 5], 4, 32, 3, codes.astype("uint8"), scale.astype(np.float32), zero)
    made, tensors = ours.make_matmul_weight_only_node(node, *given)
    known = {t.name: onnx.numpy_helper.to_array(t) for t in tensors}
    meant = matrix(made, known)
    np.testing.assert_allclose(meant.T.reshape(15, 32), (codes - zero) * scale, rtol=1e-6)
    with pytest.raises(ValueError, match="cannot reshape"):
        incumbent.make_matmul_weight_only_node(node, *given)


@pytest.mark.ort(294, 295, "G21")
@pytest.mark.parametrize("algorithm", ["RTN", "k_quant"])
def test_models_by_rounding(algorithm: str) -> None:
    source = chain()
    before = source.SerializeToString()
    config = {"/h1": {"bits": 8, "group_size": 16, "scheme": "sym"}, "/h2": "fp32"}
    result = rtn_quantize(source, config, group_size=64, algorithm=algorithm, accuracy_level=1)
    assert source.SerializeToString() == before
    nodes = result.model.graph.node
    assert [n.op_type for n in nodes] == ["MatMulNBits", "MatMul", "MatMulNBits"]
    sizes = [(a["bits"], a["block_size"]) for a in map(attributes, (nodes[0], nodes[2]))]
    assert sizes == [(8, 16), (4, 64)]
    x = {"h0": drawn(3, 64, seed=9)}
    (wanted,), (got,) = run(in_floats(result.model), x), run(result.model, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.ort(296, "G4", "G21")
def test_models_by_compensation() -> None:
    """onnxruntime's is rounding to nearest; this one's errors cancel on the data."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(16, 64)).astype(np.float32)
    batches = [rng.normal(size=(32, 16)).astype(np.float32) @ basis for _ in range(6)]
    source, errors = chain(1), {}
    loader = [({"h0": batch}, None) for batch in batches[:4]]
    wanted = np.concatenate([run(source, {"h0": x})[0] for x in batches[4:]])
    for name, result in (
        ("gptq", gptq_quantize(source, loader, n_samples=-1)),
        ("rtn", rtn_quantize(source, algorithm="RTN")),
    ):
        got = np.concatenate([run(result.model, {"h0": x})[0] for x in batches[4:]])
        errors[name] = np.square(got - wanted).mean()
    assert errors["gptq"] < 0.5 * errors["rtn"]


@pytest.mark.ort(296)
def test_a_weight_by_compensation() -> None:
    weight, inputs = drawn(64, 8), drawn(500, 16) @ drawn(16, 64, seed=1)
    moments = inputs.T @ inputs
    kept = weight.copy(), moments.copy()
    rounded = ours.gptq(weight, moments, group_size=32)
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(moments, kept[1])
    nearest = ours.qdq_tensor(weight.T, group_size=32, dtype="uint").T
    errors = [np.square(inputs @ (w - weight)).mean() for w in (rounded, nearest)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.ort(294, "G24")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "symmetric"}, "is not 'sym' or 'asym'"),
        ({"algorithm": "rtn"}, "choose k_quant or RTN"),
        ({"weight_config": {"/h9": "fp32"}}, "'/h9' does not exist"),
        ({"num_bits": 3}, "bits=3"),
        ({"group_size": 24}, "power of 2 from 16 to 256"),
    ],
)
def test_nonsense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rtn_quantize(chain(), **given)


@pytest.mark.ort(296)
def test_data_becomes_inputs_by_name() -> None:
    given = [({"h0": torch.ones(2, 64)}, 0), (np.ones((2, 64), np.float32), 0)]
    inputs, _ = ours.prepare_inputs(chain(), -1, given, ["CPUExecutionProvider"])
    assert [{k: v.shape for k, v in batch.items()} for batch in inputs] == [{"h0": (2, 64)}] * 2
    few, _ = ours.prepare_inputs(chain(), 1, given, [])
    assert len(few) == 1
    with pytest.raises(ValueError, match="Input number mismatch"):
        ours.prepare_inputs(chain(), -1, [({"a": np.ones(1), "b": np.ones(1)}, 0)], [])


@pytest.mark.ort("G57")
def test_what_is_no_array_is_an_error_and_nothing_exits() -> None:
    """onnxruntime's ``to_numpy`` calls ``exit(0)`` where torch is missing."""
    assert "exit(0)" in inspect.getsource(incumbent_util.to_numpy)
    assert "exit" not in inspect.getsource(util)
    np.testing.assert_array_equal(util.to_numpy(torch.ones(2, dtype=torch.bfloat16)), [1, 1])
    np.testing.assert_array_equal(util.to_numpy([1, 2]), [1, 2])
    with pytest.raises(AssertionError, match="not supported to convert"):
        util.to_numpy([[1], [1, 2]])


@pytest.mark.ort("G67", 362)
def test_no_progress_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's prints a bar to stdout for each node."""
    rtn_quantize(chain())
    util.simple_progress_bar(3, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.ort(278, 362)
def test_the_wrapper_of_a_model(tmp_path: Path) -> None:
    onnx.save(chain(), tmp_path / "m.onnx")
    model = ONNXModel(str(tmp_path / "m.onnx"))
    assert (model.input(), model.output(), model.is_large_model) == (["h0"], ["h3"], False)
    assert model.get_initializer_share_num("w1") == 1
    assert model.get_node("/h2").input[0] == "h1"
    assert [n.name for n in model.input_name_to_nodes["h1"]] == ["/h2"]
    assert model.output_name_to_node["h1"].name == "/h1"
    assert model.graph_info["/h1"] == "MatMul"
    model.add_tensors_to_outputs(["h1", "h3"])
    assert model.output() == ["h3", "h1"]
    model.remove_tensors_from_outputs(["h1"])
    model.set_initializer("w1", np.zeros((64, 64)))
    model.add_initializers([onnx.numpy_helper.from_array(np.ones(3, np.float32), "c")])
    assert not constants(model.model.graph)["w1"].any()
    assert len(model.nodes()) == 3  # as in qwrap.ort.onnx_model
    model.save(tmp_path / "n.onnx")
    assert not run(str(tmp_path / "n.onnx"), {"h0": drawn(2, 64)})[0].any()
    with pytest.raises(ValueError, match="does not exist"):
        model.save(tmp_path / "no" / "n.onnx")
    with pytest.raises(ValueError, match="'w9' does not exist"):
        model.set_initializer("w9", np.zeros(1))
