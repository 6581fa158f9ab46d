import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qwrap


def nodes_of(file, kind):
    return [n for n in file.graph.node if n.op_type == kind]


def test_names_follow_those_of_onnxruntimes_tool(small, quantized) -> None:
    file = quantized(small.convs()).file()
    assert {i.name for i in file.graph.initializer} == {
        *(f"{n}_{part}" for n in ("x", "b", "y") for part in ("scale", "zero_point")),
        *(
            f"{n}_{part}"
            for n in ("w1", "w2", "b1", "b2")
            for part in ("quantized", "scale", "zero_point")
        ),
    }
    names = [n.name for n in file.graph.node]
    assert {"x_QuantizeLinear", "x_DequantizeLinear", "w1_DequantizeLinear"} <= set(names)
    assert len(set(names)) == len(names)


def test_nodes_keep_their_order_names_and_outputs(small, quantized) -> None:
    source = small.convs()
    file = quantized(source).file()
    kept = [n for n in file.graph.node if "QuantizeLinear" not in n.op_type and n.name != "/y"]
    kept = [n for n in kept if n.op_type != "DequantizeLinear"]
    assert [n.name for n in kept] == ["/a", "/b"]
    assert [list(n.output) for n in kept] == [["a"], ["b"]]
    onnx.checker.check_model(file, full_check=True)


def test_untouched_nodes_stay_byte_identical(small, quantized) -> None:
    nodes = "a = Conv(x, w) b = Tanh(a) c = Softplus(b) d = Elu<alpha=0.3>(c) y = Conv(d, v)"
    source = small.build(nodes, {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)})
    source.graph.node[2].doc_string = "kept"
    source.graph.node[2].metadata_props.add(key="k", value="v")
    found = {n.name: n for n in quantized(source).file().graph.node}
    for node in source.graph.node[2:4]:  # those whose inputs stay what they were
        assert found[node.name].SerializeToString() == node.SerializeToString()


def test_names_that_are_taken_get_a_number(small, quantized) -> None:
    source = small.convs()
    rename(source, "a", "x_QuantizeLinear_Output")
    rename(source, "w1", "x_scale")
    rename(source, "w2", "y_float")
    source.graph.node[1].name = "x_QuantizeLinear"
    result = quantized(source)
    onnx.checker.check_model(result.file(), full_check=True)
    assert result.verify().deployed.differing == 0
    assert result.operators()["QLinearConv"] == 2


def rename(model, old: str, new: str) -> None:
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [new if name == old else name for name in field]
    for tensor in model.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name


def test_an_output_that_is_read_inside_too_keeps_its_name(small, quantized) -> None:
    nodes = "a = Conv(x, w) y = Conv(a, v)"
    source = small.build(
        nodes,
        {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1)},
        outputs="float[N,6,8,8] a, float[N,4,8,8] y",
    )
    result = quantized(source)
    assert [o.name for o in result.file().graph.output] == ["a", "y"]
    assert result.operators()["QLinearConv"] == 2
    report = result.verify()
    assert report.deployed.differing == 0
    assert all(o.max_abs_difference == 0 for o in report.deployed.outputs)


def test_an_input_that_is_an_output_too_keeps_its_name(small, quantized) -> None:
    source = small.build("y = Conv(x, w)", {"w": (4, 3, 1, 1)})
    source.graph.output.append(source.graph.input[0])
    result = quantized(source)
    assert [o.name for o in result.file().graph.output] == ["y", "x"]
    assert [i.name for i in result.file().graph.input] == ["x"]
    (batch, *_) = small.batches()
    assert np.array_equal(small.run(result.path, batch)[1], batch)


def test_a_tensor_with_several_readers_has_one_pair(small, quantized) -> None:
    nodes = "a = Conv(x, w) b = Conv(a, v) c = Conv(a, u) y = Add(b, c) "
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1), "o": (4, 4, 1, 1)}
    source = small.build(nodes.replace("y =", "d =") + "y = Conv(d, o)", weights)
    result = quantized(source)
    assert len([n for n in nodes_of(result.file(), "QuantizeLinear") if n.input[0] == "a"]) == 1
    found = result.operators()
    assert (found["QLinearConv"], found["QLinearAdd"]) == (4, 1)


def test_a_value_captured_by_a_branch_is_dequantized_inside(small, quantized) -> None:
    nodes = (
        "a = Conv(x, w) m = ReduceMean<keepdims=0>(x) g = Greater(m, z) "
        "y = If (g) <then_branch = t () => (float[N,4,8,8] p) { p = Conv(a, v) }, "
        "else_branch = e () => (float[N,4,8,8] q) { q = Conv(a, u) }>"
    )
    weights = {"w": (6, 3, 1, 1), "v": (4, 6, 1, 1), "u": (4, 6, 1, 1)}
    source = small.build(nodes, weights | {"z": np.zeros((), np.float32)})
    result = quantized(source, [b + s for b in small.batches() for s in (-0.5, 0.5)])
    (branches,) = nodes_of(result.file(), "If")
    for attribute in branches.attribute:
        first = attribute.g.node[0]
        assert (first.op_type, first.input[0]) == ("DequantizeLinear", "a_QuantizeLinear_Output")
    onnx.checker.check_model(result.file(), full_check=True)
    assert result.operators()["QLinearConv"] == 3
    assert result.verify().deployed.differing == 0


def test_codes_and_scales_say_what_the_weight_was(small, quantized) -> None:
    source = small.convs()
    file = quantized(source, config=qwrap.QConfig(scope="kernels", weight_method="minmax")).file()
    stored = {i.name: numpy_helper.to_array(i) for i in file.graph.initializer}
    weight = numpy_helper.to_array(source.graph.initializer[0])
    scale = np.abs(weight).max((1, 2, 3)) / 127
    np.testing.assert_allclose(stored["w1_scale"], scale, rtol=1e-6)  # float32 of a float64
    assert stored["w1_quantized"].dtype == np.int8
    expected = np.rint(weight / stored["w1_scale"][:, None, None, None])
    np.testing.assert_array_equal(stored["w1_quantized"], expected)
    bias = numpy_helper.to_array(source.graph.initializer[1]).astype(np.float64)
    np.testing.assert_array_equal(stored["b1_scale"], stored["x_scale"] * stored["w1_scale"])
    np.testing.assert_array_equal(stored["b1_quantized"], np.rint(bias / stored["b1_scale"]))
    assert stored["b1_quantized"].dtype == np.int32


def test_a_float_constant_that_others_read_stays(small, quantized) -> None:
    nodes = "a = Conv(x, w) b = Tanh(w) c = ReduceSum<keepdims=0>(b) y = Mul(a, c)"
    result = quantized(small.build(nodes, {"w": (4, 3, 1, 1)}))
    names = {i.name for i in result.file().graph.initializer}
    assert {"w", "w_quantized"} <= names


def test_a_per_tensor_file_needs_no_axis(small, quantized) -> None:
    file = quantized(
        small.convs(opset=11), config=qwrap.QConfig(scope="kernels", per_channel=False)
    ).file()
    assert file.opset_import[0].version == 11
    assert not [a for n in nodes_of(file, "DequantizeLinear") for a in n.attribute]


@pytest.mark.parametrize("opset", [7, 9, 11, 12])
def test_an_axis_raises_the_opset_to_13(small, quantized, opset: int) -> None:
    result = quantized(small.convs(opset=opset))
    assert result.file().opset_import[0].version == 13
    assert result.operators()["QLinearConv"] == 2
    assert result.verify().deployed.differing == 0


def test_value_types_in_the_file_are_those_of_the_source(small, quantized) -> None:
    source = small.convs()
    kind = helper.make_tensor_value_info("b", TensorProto.FLOAT, ["N", 6, 8, 8])
    source.graph.value_info.append(kind)
    file = quantized(source).file()
    assert kind.SerializeToString() in [v.SerializeToString() for v in file.graph.value_info]
    for field in ("input", "output"):
        before, after = getattr(source.graph, field), getattr(file.graph, field)
        assert [v.SerializeToString() for v in before] == [v.SerializeToString() for v in after]


def test_what_nothing_reads_gets_no_pair(small, quantized) -> None:
    weights = {"w": (1, 16, 8), "r": (1, 16, 4)}
    source = small.build("s, y = LSTM<hidden_size=4>(x, w, r)", weights, "float[L,N,8] x")
    source.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, [1, "N", 4]))
    made = quantized(source, small.batches(2, (3, 2, 8)), qwrap.QConfig(scope="all"))
    assert "s" in made.model.plan.tensors
    assert {n.input[0] for n in nodes_of(made.file(), "QuantizeLinear")} == {"x", "y_float"}
