"""Three bits: eight levels, in the codes of four bits that onnxruntime reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from nbits_files import attributes, constants, drawn, in_floats, lookup, matrix, product, run, table
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

import qwrap
from qwrap.ort.report import Report


def quantized(model: onnx.ModelProto, **settings: Any) -> onnx.ModelProto:
    result = qwrap.quantize_weights(model, bits=3, block_size=32, **settings)
    assert result is not None
    return result


def test_onnxruntime_reads_no_packed_codes_of_three_bits() -> None:
    """When it does, ``BlockFormat.stored_bits`` can become 3."""
    sizes = {"K": 64, "N": 8, "bits": 3, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **sizes)
    info = helper.make_tensor_value_info
    codes = helper.make_tensor("q", TensorProto.UINT8, [8, 2, 12], bytes(192), raw=True)
    scale = helper.make_tensor("s", TensorProto.FLOAT, [8, 2], np.ones(16, np.float32))
    given, made = info("x", 1, ["B", 64]), info("y", 1, None)
    graph = helper.make_graph([node], "one", [given], [made], [codes, scale])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Fail):
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("method", "form"),
    [(m, f) for m in ("rtn", "k_quant") for f in ("operator", "qdq")] + [("hqq", "operator")],
)
def test_a_block_has_eight_levels_that_sessions_multiply_with(
    method: str, symmetric: bool, form: Any
) -> None:
    model = quantized(product(drawn(72, 24)), symmetric=symmetric, method=method, form=form)
    known, node = constants(model.graph), model.graph.node[0]
    weight = (matrix if form == "operator" else table)(node, known)
    for k in range(0, 72, 32):
        levels = [len(np.unique(column)) for column in weight[k : k + 32].T]
        assert max(levels) <= 8
        assert np.mean(levels) > 4 or k == 64  # the last block has 8 weights
    feeds = {"x": drawn(3, 72, seed=1)}
    # Sums of 72 products of about 0.1, in another order.
    np.testing.assert_allclose(run(model, feeds)[0], run(in_floats(model), feeds)[0], atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_tables_are_looked_up_in_their_eight_levels(symmetric: bool) -> None:
    model = quantized(lookup(drawn(40, 64)), symmetric=symmetric, op_types=["Gather"])
    feeds = {"i": np.arange(40)}
    (found,) = run(model, feeds)
    assert max(len(np.unique(block)) for block in found.reshape(-1, 32)) <= 8
    np.testing.assert_allclose(found, run(in_floats(model), feeds)[0], atol=1e-7)


def test_the_report_and_the_file_say_that_four_bits_are_stored() -> None:
    report, source = Report(), product(drawn(256, 64))
    three = quantized(source, report=report)
    four = qwrap.quantize_weights(source, bits=4, block_size=32)
    assert four is not None
    assert report.nodes[0].reason == "MatMulNBits, 3 bits stored in 4, blocks of 32"
    assert attributes(three.graph.node[0])["bits"] == 4
    sizes = [sum(a.nbytes for a in constants(m.graph).values()) for m in (three, four)]
    assert sizes[0] == sizes[1]


def test_the_error_lies_between_those_of_two_and_of_four_bits() -> None:
    weight, errors = drawn(256, 64), []
    for bits in (2, 3, 4):
        model = qwrap.quantize_weights(product(weight), bits=bits, block_size=32)
        assert model is not None
        meant = matrix(model.graph.node[0], constants(model.graph))
        errors.append(float(np.square(meant - weight).sum()))
    # A step is 7/3 and 15/7 times as wide: about 5 times the squared error each time.
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
