"""Embedding tables in blocks, also such as the last layer shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nbits_files import attributes, constants, drawn, in_floats, lookup, model_of, run, walk
from onnx import helper

import qwrap
from qwrap.errors import QwrapWarning
from qwrap.ort.report import Report

Array = np.ndarray[Any, np.dtype[Any]]


def quantized(model: Any, **settings: Any) -> onnx.ModelProto:
    result = qwrap.quantize_weights(model, **settings)
    assert result is not None
    return result


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in walk(model.graph)]


def assert_computes_its_codes(model: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    wanted, got = run(in_floats(model), feeds), run(model, feeds)
    for a, b in zip(wanted, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)  # sums in other orders


@pytest.mark.ort(289)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "gather_axis", "axis"),
    [((40, 64), 0, 1), ((40, 64), 1, 0), ((40, 72), 0, -1), ((3, 40, 20), 0, 1)],
)
def test_tables_compute_what_their_codes_mean(
    shape: tuple[int, ...], gather_axis: int, axis: int, symmetric: bool
) -> None:
    model = quantized(
        lookup(drawn(*shape), gather_axis),
        op_types=["Gather"],
        block_size=16,
        axis=axis,
        symmetric=symmetric,
    )
    assert_computes_its_codes(model, {"i": np.array([2, 0, 1, 2])})
    (node,) = model.graph.node
    assert attributes(node) == {
        "gather_axis": gather_axis,
        "quantize_axis": axis % len(shape),
        "block_size": 16,
    }


@pytest.mark.ort(283, 289)
def test_blocks_of_tables_may_be_large() -> None:
    model = quantized(lookup(drawn(40, 1000)), op_types=["Gather"], block_size=512)
    assert_computes_its_codes(model, {"i": np.array([2, 0])})


@pytest.mark.ort(289)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_tables_of_other_bits_are_packed_in_bytes(bits: int, symmetric: bool) -> None:
    """onnxruntime's tool logs an error and leaves the table in float."""
    settings = {"op_types": ["Gather"], "block_size": 16, "symmetric": symmetric}
    model = quantized(lookup(drawn(40, 72)), bits=bits, **settings)
    assert_computes_its_codes(model, {"i": np.array([2, 0, 1, 39])})
    report = Report()
    with pytest.warns(QwrapWarning, match="no weight was quantized"):
        left = quantized(lookup(drawn(40, 72)), bits=bits, axis=0, report=report, **settings)
    assert types(left) == ["Gather"]
    assert "blocks along axis 1" in report.nodes[0].reason


def tied(transposed: bool) -> onnx.ModelProto:
    """A table, and a last layer with its weights."""
    nodes = [helper.make_node("Gather", ["w", "i"], ["x"])]
    if transposed:
        nodes.append(helper.make_node("Transpose", ["w"], ["t"]))
    nodes.append(helper.make_node("MatMul", ["x", "t" if transposed else "w"], ["y"]))
    return model_of(nodes, {"w": drawn(64, 64)}, {"i": ["B"]}, ["y"], integers=["i"])


@pytest.mark.ort(289, "G47")
@pytest.mark.parametrize("transposed", [True, False])
def test_a_table_tied_to_the_last_layer_leaves_no_float_copy(transposed: bool) -> None:
    model = quantized(tied(transposed), block_size=32, op_types=["MatMul", "Gather"])
    assert types(model) == ["GatherBlockQuantized", "MatMulNBits"]
    assert_computes_its_codes(model, {"i": np.array([0, 5, 63])})
    assert max(t.nbytes for t in constants(model.graph).values()) <= 64 * 64
