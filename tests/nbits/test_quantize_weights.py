"""Files of quantized weights: they load, and compute what their codes mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from nbits_files import (
    attributes,
    constants,
    drawn,
    in_floats,
    matrix,
    model_of,
    product,
    run,
    table,
    tensor,
    walk,
)
from onnx import helper

import qwrap
from qwrap.errors import ConfigError, ExportError, QwrapWarning
from qwrap.nbits.blocks import BlockFormat
from qwrap.ort.report import Report

Array = np.ndarray[Any, np.dtype[Any]]
FORMS = ["operator", "qdq"]


def quantized(model: Any, **settings: Any) -> onnx.ModelProto:
    result = qwrap.quantize_weights(model, **settings)
    assert result is not None
    return result


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in walk(model.graph)]


def assert_computes_its_codes(model: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    """The session's outputs are those of the float model with the weights that the codes mean."""
    wanted, got = run(in_floats(model), feeds), run(model, feeds)
    for a, b in zip(wanted, got, strict=True):
        assert a.shape == b.shape
        # Kernels add in other orders; float16 ones round each product's sum to 11 bits.
        slack = 2e-3 if a.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(b, a, rtol=slack, atol=slack * np.abs(a).max())


@pytest.mark.ort(281, 282, 285)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_form_computes_what_its_codes_mean(bits: int, symmetric: bool, form: Any) -> None:
    weight = drawn(72, 24)  # the last block of 32 is short
    model = quantized(product(weight), bits=bits, block_size=32, symmetric=symmetric, form=form)
    assert_computes_its_codes(model, {"x": drawn(3, 72, seed=1)})
    assert types(model) == (
        ["MatMulNBits"] if form == "operator" else ["DequantizeLinear", "MatMul"]
    )


@pytest.mark.ort(288)
@pytest.mark.parametrize("form", FORMS)
def test_float16_weights_keep_float16_scales(form: Any) -> None:
    model = quantized(product(drawn(64, 24, dtype=np.float16)), block_size=32, form=form)
    (scale,) = (a for name, a in constants(model.graph).items() if name.endswith("_scales"))
    assert scale.dtype == np.float16
    assert_computes_its_codes(model, {"x": drawn(3, 64, seed=1, dtype=np.float16)})


@pytest.mark.ort(288)
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_weights_keep_bfloat16_scales(form: Any) -> None:
    weight = drawn(64, 24).astype(ml_dtypes.bfloat16)
    model = quantized(product(weight), bits=8, block_size=32, form=form)
    known = constants(model.graph)
    (scale,) = (a for name, a in known.items() if name.endswith("_scales"))
    assert scale.dtype == ml_dtypes.bfloat16
    meant = (matrix if form == "operator" else table)(model.graph.node[0], known)
    # onnxruntime has no bfloat16 product on CPU: half a step of 255 of a range of about 2 at most.
    assert np.abs(meant - weight.astype(np.float64)).max() < 0.005


@pytest.mark.ort(287)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (2, 1, 1, 3, 64)])
@pytest.mark.parametrize("leading", [(1,), (1, 1)])
def test_a_matrix_in_unit_dimensions_gives_the_rank_that_matmul_gives(
    leading: tuple[int, ...], shape: tuple[int, ...], known: bool, form: Any
) -> None:
    source = product(drawn(*leading, 64, 24), shape=list(shape) if known else None)
    model = quantized(source, block_size=32, form=form, bits=8)
    x = drawn(*shape, seed=1)
    (wanted,), (got,) = run(source, {"x": x}), run(model, {"x": x})
    assert wanted.shape == got.shape
    np.testing.assert_allclose(got, wanted, atol=0.03)  # 8 bits of 64 weights of about 0.3
    expands = "Expand" in types(model)
    assert expands == (not known or len(shape) < len(leading) + 2)


@pytest.mark.ort(287)
def test_a_stack_of_matrices_is_left_and_said() -> None:
    report = Report()
    with pytest.warns(QwrapWarning, match="no weight was quantized"):
        model = quantized(product(drawn(2, 64, 24), shape=["B", 3, 64]), report=report)
    assert types(model) == ["MatMul"]
    assert "is not one matrix" in report.nodes[0].reason


@pytest.mark.ort("G47")
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_two_products_is_one_set_of_codes(form: Any) -> None:
    """onnxruntime's tool defines ``w_DQ_Q4_output`` twice, and no session opens."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    source = model_of(nodes, {"w": drawn(64, 64)}, {"x": ["B", 64]}, ["y"])
    model = quantized(source, block_size=32, form=form)
    assert_computes_its_codes(model, {"x": drawn(3, 64, seed=1)})
    assert len(model.graph.initializer) == 3
    assert types(model).count("DequantizeLinear") == (form == "qdq")


def branches(weight_inside: bool) -> onnx.ModelProto:
    """``y = x @ w if c else (x @ w) @ w``, in bodies of an If."""
    info = helper.make_tensor_value_info

    def body(name: str, nodes: list[onnx.NodeProto], result: str) -> onnx.GraphProto:
        inside = [tensor(drawn(64, 64), f"w_{name}")] if weight_inside else []
        for node in nodes:
            node.name = f"/{name}/{node.output[0]}"
            if weight_inside:
                node.input[1] = f"w_{name}"
        return helper.make_graph(nodes, name, [], [info(result, 1, None)], inside)

    one = body("one", [helper.make_node("MatMul", ["x", "w"], ["a"])], "a")
    two = body(
        "two",
        [
            helper.make_node("MatMul", ["x", "w"], ["b"]),
            helper.make_node("MatMul", ["b", "w"], ["d"]),
        ],
        "d",
    )
    node = helper.make_node("If", ["c"], ["y"], name="If", then_branch=one, else_branch=two)
    weights = {} if weight_inside else {"w": drawn(64, 64)}
    model = model_of([node], weights, {"x": ["B", 64]}, ["y"])
    model.graph.input.append(info("c", onnx.TensorProto.BOOL, []))
    return model


@pytest.mark.ort(274)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_inside", [True, False])
@pytest.mark.parametrize("condition", [True, False])
def test_bodies_of_control_flow_are_quantized(
    condition: bool, weight_inside: bool, form: Any
) -> None:
    model = quantized(branches(weight_inside), block_size=32, form=form)
    feeds = {"x": drawn(3, 64, seed=1), "c": np.array(condition)}
    assert_computes_its_codes(model, feeds)
    operator = "MatMulNBits" if form == "operator" else "DequantizeLinear"
    assert types(model).count(operator) == (3 if form == "operator" else 2)
    codes = [n for n in constants(model.graph) if "_Q4" in n]
    # onnxruntime fuses pairs in a body only with codes that are in it, and else opens no session.
    assert len(codes) == (2 if weight_inside or form == "qdq" else 1)


@pytest.mark.ort(281)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("through", ["Constant", "Identity", "input"])
def test_weights_are_found_wherever_a_constant_may_be(through: str, form: Any) -> None:
    weight = drawn(64, 24)
    source = product(weight)
    graph = source.graph
    if through == "input":  # as exporters wrote before IR version 4
        source.ir_version = 3
        graph.input.append(helper.make_tensor_value_info("w", 1, [64, 24]))
    elif through == "Constant":
        del graph.initializer[:]
        graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor(weight, "t")))
    else:
        graph.initializer[0].name = "v"
        graph.node.insert(0, helper.make_node("Identity", ["v"], ["w"]))
    model = quantized(source, block_size=32, form=form)
    assert_computes_its_codes(model, {"x": drawn(3, 64, seed=1)})
    assert not set(types(model)) & {"Constant", "Identity"}
    assert [i.name for i in model.graph.input] == ["x"]
    left = constants(model.graph).values()
    assert not any(array.shape == (64, 24) and array.dtype == np.float32 for array in left)


@pytest.mark.ort(284)
@pytest.mark.parametrize(("given", "written"), [(None, None), (0, None), (1, 1), (4, 4)])
def test_the_accuracy_level_is_written_if_it_says_something(given: Any, written: Any) -> None:
    model = quantized(product(drawn(64, 24)), accuracy_level=given)
    assert attributes(model.graph.node[0]).get("accuracy_level") == written


@pytest.mark.ort(284)
def test_level_4_costs_more_than_level_0_does() -> None:
    weight, x = drawn(256, 64), drawn(16, 256, seed=1)
    errors = []
    for level in (0, 4):
        model = quantized(product(weight), block_size=32, bits=8, accuracy_level=level)
        errors.append(np.abs(run(model, {"x": x})[0] - run(in_floats(model), {"x": x})[0]).max())
    assert errors[0] < 1e-4 < 1e-3 < errors[1]


@pytest.mark.ort(271, "G56")
@pytest.mark.parametrize("form", FORMS)
def test_the_opset_rises_by_conversion(form: Any) -> None:
    """onnxruntime's tool writes 21, and leaves a Squeeze whose axes 21 does not know."""
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["a"], axes=[0]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Squeeze", ["b"], ["y"], axes=[0]),
    ]
    source = model_of(nodes, {"w": drawn(64, 24)}, {"x": ["B", 64]}, ["y"], opset=11, ir_version=6)
    model = quantized(source, block_size=32, form=form)
    wanted = (21, 10) if form == "qdq" else (11, 6)
    assert (model.opset_import[0].version, model.ir_version) == wanted
    assert_computes_its_codes(model, {"x": drawn(3, 64, seed=1)})


@pytest.mark.ort("G56")
def test_what_cannot_rise_is_refused() -> None:
    node = helper.make_node("Scan", ["s", "x"], ["t", "y"], num_scan_inputs=1, body=_scan_body())
    product_node = helper.make_node("MatMul", ["y", "w"], ["z"])
    source = model_of(
        [node, product_node],
        {"w": drawn(64, 24)},
        {"s": [1, 64], "x": [1, 3, 64]},
        ["z"],
        opset=8,
    )
    node.input.insert(0, "")
    source.graph.node[0].CopyFrom(node)
    with pytest.raises(ExportError, match="Scan"):
        quantized(source, block_size=32, form="qdq")


def _scan_body() -> onnx.GraphProto:
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Add", ["s0", "x0"], ["s1"]),
        helper.make_node("Identity", ["s1"], ["y1"]),
    ]
    given, made = [[info(n, 1, [64]) for n in names] for names in (("s0", "x0"), ("s1", "y1"))]
    return helper.make_graph(nodes, "body", given, made)


@pytest.mark.ort(291)
def test_names_choose_nodes_and_formats() -> None:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(3)]
    weights = {f"w{i}": drawn(64, 64, seed=i) for i in range(3)}
    source = model_of(nodes, weights, {"h0": ["B", 64]}, ["h3"])
    only = quantized(source, nodes=["/h2"])
    assert types(only) == ["MatMul", "MatMulNBits", "MatMul"]
    rest = quantized(source, exclude=["/h2"], formats={"/h3": BlockFormat(8, 32)})
    assert types(rest) == ["MatMulNBits", "MatMul", "MatMulNBits"]
    assert [attributes(rest.graph.node[i])["bits"] for i in (0, 2)] == [4, 8]


@pytest.mark.ort(280, 283)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "only 2, 3, 4 or 8 bits"),
        ({"block_size": 20}, "power of 2 from 16 on"),
        ({"block_size": 8}, "power of 2 from 16 on"),
        ({"block_size": 0}, 'form="qdq"'),
        ({"block_size": 512}, "node 'product': block_size=512.*to 256"),
        ({"block_size": 512, "form": "nf4"}, "to 256"),
        ({"block_size": 512, "method": "gptq", "batches": [None]}, "to 256"),
        ({"block_size": -1, "form": "qdq"}, "0 or more"),
        ({"method": "rnt"}, "no method 'rnt'; 'rtn'"),
        ({"method": "gptq"}, "needs data: give batches"),
        ({"batches": []}, "uses no data"),
        ({"form": "QDQ"}, "choose from"),
        ({"form": "nf4", "bits": 8}, "has 4 bits, not 8"),
        ({"form": "nf4", "method": "hqq"}, 'knows no method but "rtn"'),
        ({"accuracy_level": 5}, "choose from"),
        ({"op_types": ["Relu"]}, "choose from"),
        ({"exclude": ["prodct"]}, "no node 'prodct'; 'product'"),
        ({"nodes": ["prodct"]}, "no node 'prodct'; 'product'"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qwrap.quantize_weights(product(drawn(64, 24)), **settings)


def test_a_node_without_weights_cannot_be_named() -> None:
    source = model_of([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": ["B"]}, ["y"])
    with pytest.raises(ConfigError, match="of type Relu; only MatMul, Gemm, Conv and Gather"):
        qwrap.quantize_weights(source, nodes=["/y"])


def test_weights_that_are_not_finite_stay_float() -> None:
    weight = drawn(64, 24)
    weight[3, 3] = np.inf
    report = Report()
    with pytest.warns(QwrapWarning, match="no weight was quantized"):
        assert types(quantized(product(weight), report=report)) == ["MatMul"]
    assert "not finite" in str(report)


def test_the_model_that_was_given_is_not_changed(tmp_path: Path) -> None:
    source = product(drawn(64, 24))
    before = source.SerializeToString()
    assert qwrap.quantize_weights(source, tmp_path / "q.onnx", form="qdq") is None
    assert source.SerializeToString() == before
    written = onnx.load(tmp_path / "q.onnx")
    assert written == quantized(source, form="qdq")


def test_a_file_does_not_take_its_own_place(tmp_path: Path) -> None:
    onnx.save(product(drawn(64, 24)), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="is the model itself"):
        qwrap.quantize_weights(tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert types(onnx.load(tmp_path / "m.onnx")) == ["MatMul"]


@pytest.mark.ort(285, 286)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_an_output(symmetric: bool) -> None:
    model = quantized(product(drawn(40, 24)), form="qdq", block_size=0, symmetric=symmetric)
    assert attributes(model.graph.node[0]) == {"axis": 0, "block_size": 40}
    assert constants(model.graph)["w_DQ_scales"].shape == (1, 24)
    assert_computes_its_codes(model, {"x": drawn(3, 40, seed=1)})


def test_a_function_of_ones_own_makes_the_codes() -> None:
    def zeros(weight: Any, form: BlockFormat, statistics: Any) -> Any:
        blocks = qwrap.nbits.rtn.round_to_nearest(weight * 0, form, statistics)
        return blocks

    model = quantized(product(drawn(64, 24)), method=zeros)
    assert not run(model, {"x": drawn(3, 64, seed=1)})[0].any()


@pytest.mark.ort(293, 295, 296)
@pytest.mark.parametrize("method", ["hqq", "k_quant", "gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_files_of_each_method_compute_their_codes(bits: int, method: str) -> None:
    batches = [drawn(8, 72, seed=i) for i in range(4)] if method == "gptq" else None
    source = product(drawn(72, 24))
    model = quantized(source, method=method, bits=bits, block_size=32, batches=batches)
    assert_computes_its_codes(model, {"x": drawn(3, 72, seed=9)})


def test_float_zero_points_do_not_fit_pairs() -> None:
    with pytest.raises(ConfigError, match="integer zero points"):
        quantized(product(drawn(64, 24)), method="hqq", form="qdq")


@pytest.mark.ort("G75")
def test_the_report_says_of_each_node_what_became_of_it() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "h"], ["g"]),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    report = Report()
    source = model_of(nodes, {"w": drawn(64, 64)}, {"x": [64, 64]}, ["y"])
    qwrap.quantize_weights(source, block_size=32, report=report)
    assert [(n.name, n.quantized) for n in report.nodes] == [
        ("/h", True),
        ("/g", False),
        ("/y", False),
    ]
    assert [n.reason for n in report.nodes] == [
        "MatMulNBits, 4 bits, blocks of 32",
        "its second input is no constant of a float type",
        "not asked for",
    ]
