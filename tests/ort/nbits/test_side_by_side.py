"""The same call with either import: equal graphs and equal bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.matmul_nbits_quantizer as incumbent
import pytest
from nbits_files import (
    attributes,
    constants,
    drawn,
    in_floats,
    lookup,
    model_of,
    product,
    run,
    walk,
)
from onnx import helper

import qwrap.ort.matmul_nbits_quantizer as ours

Array = np.ndarray[Any, np.dtype[Any]]
SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[4] / "shared"))


def shared(name: str) -> onnx.ModelProto:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    return onnx.load(path)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def processed(module: Any, model: onnx.ModelProto, **settings: Any) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if "quant_format" in settings:
        settings["quant_format"] = module.QuantFormat[settings["quant_format"]]
    quantizer = module.MatMulNBitsQuantizer(copy, **settings)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


def forms(graph: onnx.GraphProto) -> list[Any]:
    return [
        (n.op_type, n.domain, n.name, list(n.input), list(n.output), plain(attributes(n)))
        for n in walk(graph)
    ]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if not isinstance(v, onnx.GraphProto)}


def assert_same_file(a: onnx.ModelProto, b: onnx.ModelProto) -> None:
    """Nodes, names, attributes, opsets and the bytes of all constants."""
    assert forms(a.graph) == forms(b.graph)
    assert {i.domain: i.version for i in a.opset_import} == {
        i.domain: i.version for i in b.opset_import
    }
    assert a.ir_version == b.ir_version
    first, second = constants(a.graph), constants(b.graph)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert (array.dtype, array.shape) == (second[name].dtype, second[name].shape), name
        assert array.tobytes() == second[name].tobytes(), name


@pytest.mark.ort(279, 281, 282, 283, 288, 292)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_operators(bits: int, block: int, symmetric: bool, dtype: type) -> None:
    source = product(drawn(200, 24, dtype=dtype))
    settings = {"bits": bits, "block_size": block, "is_symmetric": symmetric}
    assert_same_file(*(processed(m, source, **settings) for m in (ours, incumbent)))


@pytest.mark.ort(271, 279, 285, 288)
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128, 40])
def test_pairs(block: int, symmetric: bool, dtype: type, opset: int) -> None:
    source = product(drawn(200, 24, dtype=dtype), opset=opset)
    settings = {"block_size": block, "is_symmetric": symmetric, "quant_format": "QDQ"}
    assert_same_file(*(processed(m, source, **settings) for m in (ours, incumbent)))


@pytest.mark.ort(286)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_block_an_output(symmetric: bool) -> None:
    source = product(drawn(40, 24))
    settings = {"is_symmetric": symmetric, "quant_format": "QDQ", "channel_wised_quantize": True}
    files = [processed(m, source, **settings) for m in (ours, incumbent)]
    assert_same_file(*files)
    assert ("Transpose" in [n.op_type for n in files[0].graph.node]) == symmetric
    x = {"x": drawn(3, 40, seed=1)}
    np.testing.assert_array_equal(*(run(file, x)[0] for file in files))


@pytest.mark.ort(286)
@pytest.mark.parametrize("module", [ours, incumbent])
def test_operators_have_no_block_an_output(module: Any) -> None:
    with pytest.raises(NotImplementedError, match="is not supported channel_wised_quantize yet"):
        processed(module, product(drawn(40, 24)), channel_wised_quantize=True)


@pytest.mark.ort(271, 289, 290)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "gather_axis", "axis"), [((40, 64), 0, 1), ((40, 72), 1, 0), ((3, 40, 20), 0, -2)]
)
def test_tables(shape: tuple[int, ...], gather_axis: int, axis: int, symmetric: bool) -> None:
    settings = {
        "block_size": 16,
        "is_symmetric": symmetric,
        "op_types_to_quantize": ("Gather",),
        "quant_axes": (("Gather", axis),),
    }
    source = lookup(drawn(*shape), gather_axis)
    assert_same_file(*(processed(m, source, **settings) for m in (ours, incumbent)))


@pytest.mark.ort(289)
def test_float16_tables_differ_by_rounding_in_float32() -> None:
    """onnxruntime's tool divides in float16, whose quotients of up to 15 have 7 bits behind it."""
    settings = {"block_size": 16, "op_types_to_quantize": ("Gather",)}
    source = lookup(drawn(40, 64, dtype=np.float16))
    a, b = (constants(processed(m, source, **settings).graph) for m in (ours, incumbent))
    np.testing.assert_allclose(a["w_scales"], b["w_scales"], rtol=2e-3)
    difference = a["w_Q4"].astype(int) - b["w_Q4"].astype(int)
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.02


@pytest.mark.ort(284)
@pytest.mark.parametrize("level", [None, 0, 1, 2, 3, 4])
def test_accuracy_levels(level: int | None) -> None:
    source = product(drawn(64, 24))
    files = [processed(m, source, accuracy_level=level) for m in (ours, incumbent)]
    assert_same_file(*files)
    assert ("accuracy_level" in attributes(files[0].graph.node[0])) == bool(level)


@pytest.mark.ort(284)
def test_level_4_rounds_activations_of_pairs_too_unless_told_otherwise() -> None:
    """Why fused and unfused products of one file differ: the fusion's own accuracy level is 4."""
    model = processed(ours, product(drawn(256, 64)), block_size=32, quant_format="QDQ")
    x = {"x": drawn(16, 256, seed=1)}
    exact = run(model, x, optimised=False)[0]
    fused = run(model, x)[0]  # at level 1
    np.testing.assert_allclose(fused, exact, atol=1e-4)


def chain(count: int = 3) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(count)]
    weights = {f"w{i}": drawn(64, 64, seed=i) for i in range(count)}
    return model_of(nodes, weights, {"h0": ["B", 64]}, [f"h{count}"])


@pytest.mark.ort(291)
def test_excluded_nodes() -> None:
    files = [processed(m, chain(), nodes_to_exclude=["/h2"]) for m in (ours, incumbent)]
    assert_same_file(*files)
    assert [n.op_type for n in files[0].graph.node] == ["MatMulNBits", "MatMul", "MatMulNBits"]


@pytest.mark.ort(274)
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_bodies(form: str) -> None:
    def body(name: str, weight: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", weight], [name], name=f"/{name}")
        info = helper.make_tensor_value_info(name, 1, None)
        inside = [onnx.numpy_helper.from_array(drawn(64, 64, seed=2), "v")] if weight == "v" else []
        return helper.make_graph([node], name, [], [info], inside)

    then, other = body("a", "w"), body("b", "v")
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    source = model_of([node], {"w": drawn(64, 64)}, {"x": ["B", 64]}, ["y"])
    source.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    settings = {"block_size": 32, "quant_format": form}
    files = [processed(m, source, **settings) for m in (ours, incumbent)]
    assert_same_file(*files)
    x = drawn(3, 64, seed=1)
    for condition in (True, False):
        feeds = {"x": x, "c": np.array(condition)}
        (wanted,), (got,) = run(in_floats(files[0]), feeds), run(files[0], feeds)
        np.testing.assert_allclose(got, wanted, atol=1e-4)  # sums of 64 products in other orders


@pytest.mark.ort(271, 279, 282, 285, 289, "G56")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
@pytest.mark.parametrize("name", ["stories260k", "minilm_l6"])
def test_shared_transformers(name: str, form: str, symmetric: bool) -> None:
    """onnxruntime's tool makes an invalid model of one whose opset is not raised by a number."""
    source = shared(name)
    types = ("MatMul",) if form == "QDQ" else ("MatMul", "Gather")
    settings = {
        "block_size": 32,
        "is_symmetric": symmetric,
        "quant_format": form,
        "op_types_to_quantize": types,
    }
    a, b = (processed(m, source, **settings) for m in (ours, incumbent))
    small = {"MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "MatMul"}
    nodes = [[f for f in forms(file.graph) if f[0] in small] for file in (a, b)]
    assert nodes[0] == nodes[1]
    first, second = constants(a.graph), constants(b.graph)
    quantized = {n for f in nodes[1] for n in f[3] if n in second}
    assert len(quantized) > 60
    for key in quantized:
        assert first[key].tobytes() == second[key].tobytes(), key
    assert first.keys() >= quantized
    feeds = tokens(source)
    for wanted, got in zip(run(in_floats(a), feeds), run(a, feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)  # sums in other orders
    if name == "minilm_l6":  # opset 14 there
        with pytest.raises(Exception, match="Unrecognized attribute: axes for"):
            run(b, feeds)


def tokens(model: onnx.ModelProto) -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(1, 500, (2, 12))
    ones, zeros = np.ones_like(ids), np.zeros_like(ids)
    given = {"input_ids": ids, "attention_mask": ones, "token_type_ids": zeros}
    return {value.name: given[value.name] for value in model.graph.input}
