"""Weights inside functions of the model become codes; the rest of the functions stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nbits_files import constants, drawn, in_floats, run, tensor, walk
from onnx import helper

import qwrap


def with_functions(*, inner: bool) -> onnx.ModelProto:
    """``y = half(layer(layer(x)))``; weights in the function, or given by each call."""
    parse = onnx.parser.parse_function
    weight = "w = Constant() " if inner else ""
    layer = parse(
        '<opset_import: ["": 17], domain: "mine"> '
        f"Layer (x{'' if inner else ', w'}) => (y) {{ {weight} p = MatMul(x, w) y = Tanh(p) }}"
    )
    if inner:
        layer.node[0].attribute.append(helper.make_attribute("value", tensor(drawn(64, 64), "t")))
    half = parse(
        '<opset_import: ["": 17], domain: "mine"> Half (x) => (y) '
        "{ c = Constant<value = float {0.5}>() y = Mul(x, c) }"
    )
    given = ([], []) if inner else (["a"], ["b"])
    nodes = [
        helper.make_node("Layer", ["x", *given[0]], ["h"], domain="mine", name="first"),
        helper.make_node("Layer", ["h", *given[1]], ["g"], domain="mine", name="second"),
        helper.make_node("Half", ["g"], ["y"], domain="mine", name="third"),
    ]
    info = helper.make_tensor_value_info
    weights = [] if inner else [tensor(drawn(64, 64, seed=i), name) for i, name in enumerate("ab")]
    graph = helper.make_graph(nodes, "g", [info("x", 1, ["B", 64])], [info("y", 1, None)], weights)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[layer, half], ir_version=9)


@pytest.mark.parametrize("form", ["operator", "qdq"])
@pytest.mark.parametrize("inner", [True, False])
def test_they_become_codes_that_sessions_multiply_with(inner: bool, form: Any) -> None:
    source, feeds = with_functions(inner=inner), {"x": drawn(5, 64, seed=1)}
    made = qwrap.quantize_weights(source, block_size=32, form=form)
    assert made is not None
    types = [n.op_type for n in walk(made.graph)]
    assert types.count("MatMulNBits" if form == "operator" else "MatMul") == 2
    assert types[-1] == "Half"
    assert [f.name for f in made.functions] == ["Half"]
    (wanted,), (got,) = run(in_floats(made), feeds), run(made, feeds)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(got, run(source, feeds)[0], atol=0.4)  # 4 bits, two layers of 64


def test_one_constant_for_all_calls_is_stored_once() -> None:
    made = qwrap.quantize_weights(with_functions(inner=True), block_size=32)
    assert made is not None
    codes = [a for a in constants(made.graph).values() if a.dtype == np.uint8 and a.ndim == 3]
    assert len(codes) == 1


@pytest.mark.parametrize("inner", [True, False])
def test_data_reaches_them(inner: bool) -> None:
    source = with_functions(inner=inner)
    mixing = drawn(8, 64, seed=50)
    batches = [drawn(200, 8, seed=i) @ mixing for i in range(9)]
    made = qwrap.quantize_weights(source, block_size=32, bits=3, method="gptq", batches=batches)
    plain = qwrap.quantize_weights(source, block_size=32, bits=3)
    assert made is not None
    assert plain is not None
    feeds = {"x": drawn(64, 8, seed=99) @ mixing}
    exact, *found = (run(m, feeds)[0] for m in (source, made, plain))
    errors = [float(np.square(y - exact).sum()) for y in found]
    assert errors[0] < 0.7 * errors[1]


def test_functions_without_weights_stay() -> None:
    source = with_functions(inner=True)
    with pytest.warns(qwrap.QwrapWarning, match="no weight was quantized"):
        made = qwrap.quantize_weights(source, op_types=["Gather"])
    assert made is not None
    assert [f.name for f in made.functions] == ["Layer", "Half"]
