"""Which nodes, which ranges, and whose model: what both quantizers share."""

import numpy as np
import onnxruntime.quantization.base_quantizer as incumbent
import onnxruntime.quantization.calibrate as incumbent_calibrate
import pytest
from base_quantizer_pairs import (
    FLOAT8,
    INT8,
    INTEGERS,
    UINT8,
    conv_relu,
    pair,
)
from onnx import ModelProto, TensorProto, helper

from qwrap.ort.base_quantizer import BaseQuantizer
from qwrap.ort.calibrate import CalibrationMethod, TensorData, TensorsData


@pytest.mark.ort(7, 8, 9)
def test_nodes_are_chosen_by_name_and_type() -> None:
    model = conv_relu()
    nodes = {node.name: node for node in model.graph.node}
    for chosen, excluded, types in (
        ([], [], ["Conv", "Relu"]),
        (["conv"], [], ["Conv", "Relu"]),
        ([], ["conv"], ["Conv", "Relu"]),
        (["relu"], [], ["Conv"]),
        (None, None, ["Relu", "QuantizeLinear"]),
    ):
        arguments = (model, False, False, INT8, UINT8, None, chosen, excluded, types)
        ours, theirs = BaseQuantizer(*arguments), incumbent.BaseQuantizer(*arguments)
        for node in (*nodes.values(), helper.make_node("QuantizeLinear", ["x", "s"], ["q"], "q")):
            assert ours.should_quantize_node(node) == theirs.should_quantize_node(node)


@pytest.mark.ort(54)
@pytest.mark.parametrize("asked", [None, True, False])
def test_signed_weights_are_symmetric_unless_asked_otherwise(asked) -> None:
    ours, theirs = pair(conv_relu(), WeightSymmetric=asked)
    for onnx_type in (*INTEGERS, FLOAT8):
        assert ours.is_weight_symmetric(onnx_type) == theirs.is_weight_symmetric(onnx_type)


@pytest.mark.ort(50)
def test_constants_of_floats_only_are_weights() -> None:
    model = conv_relu(i=np.arange(3), d=np.ones(2))
    for quantizer in pair(model):
        assert quantizer.is_valid_quantize_weight("w")
        assert not quantizer.is_valid_quantize_weight("i")
        assert not quantizer.is_valid_quantize_weight("d")
        assert not quantizer.is_valid_quantize_weight("x")
        assert quantizer.is_input_a_initializer("i")
        assert not quantizer.is_input_a_initializer("x")


def ranged(model: ModelProto, **ranges: tuple[float, float]) -> BaseQuantizer:
    data = TensorsData(
        CalibrationMethod.MinMax,
        {name: tuple(map(np.float32, ends)) for name, ends in ranges.items()},
    )
    types = [node.op_type for node in model.graph.node]
    return BaseQuantizer(model, False, False, INT8, UINT8, data, [], [], types)


@pytest.mark.ort(104)
def test_what_only_a_relu_reads_has_its_range() -> None:
    quantizer = ranged(conv_relu(), x=(-1, 1), h=(-5, 5), y=(0, 5))
    before = quantizer.tensors_range
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["h"].range_value == (0, 5)
    assert before["h"].range_value == (-5, 5)  # the caller's ranges stay as they are


@pytest.mark.ort(104)
def test_a_graph_output_keeps_what_a_relu_would_cut_off() -> None:
    """The incumbent counts nodes only, and saturates such an output at 0."""
    model = conv_relu()
    model.graph.output.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    quantizer = ranged(model, x=(-1, 1), h=(-5, 5), y=(0, 5))
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["h"].range_value == (-5, 5)


@pytest.mark.ort(105, 208)
def test_a_softmax_gives_numbers_from_zero_to_one() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], "softmax")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    quantizer = ranged(model, x=(-1, 1), y=(0.25, 0.5))
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["y"].range_value == (0, 1)


@pytest.mark.ort(48, 105)
def test_a_softmax_keeps_the_spread_that_float8_needs() -> None:
    """The incumbent's range from 0 to 1 has no ``std``: AttributeError with float 8."""
    node = helper.make_node("Softmax", ["x"], ["y"], "softmax")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    numbers = {name: np.float32(1) for name in ("avg", "std", "lowest", "highest")}
    numbers |= {"hist": np.ones(2), "hist_edges": np.arange(3, dtype=np.float32)}
    data = TensorsData(CalibrationMethod.Distribution, {"y": TensorData(**numbers)})
    quantizer = BaseQuantizer(model, False, False, FLOAT8, FLOAT8, data, [], [], ["Softmax"])
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["y"].avg_std == (1, 1)


@pytest.mark.ort(179)
def test_ranges_must_be_tensor_data() -> None:
    for quantizer, data in (
        (BaseQuantizer, {"x": (0, 1)}),
        (incumbent.BaseQuantizer, {"x": (0, 1)}),
    ):
        with pytest.raises(TypeError, match="tensors_range contains unexpected types"):
            quantizer(conv_relu(), False, False, INT8, UINT8, data, [], [], [])
    assert incumbent_calibrate.TensorData is not TensorData


@pytest.mark.ort(141, 2)
def test_the_model_of_the_caller_stays_as_it_is() -> None:
    model = conv_relu()
    before = model.SerializeToString()
    quantizer, _ = pair(model)
    quantizer.quantize_initializer_impl(quantizer.initializers["w"], INT8)
    assert model.SerializeToString() == before
    quantizer.model.model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    again, _ = pair(quantizer.model.model)
    assert again.model.model is not quantizer.model.model


@pytest.mark.ort(141)
def test_a_wrong_override_is_refused_by_the_constructor() -> None:
    for quantizer in (BaseQuantizer, incumbent.BaseQuantizer):
        with pytest.raises(ValueError, match="Tensor 'z' in TensorQuantOverrides is not present"):
            quantizer(
                conv_relu(), False, False, INT8, UINT8, None, [], [], [],
                {"TensorQuantOverrides": {"z": [{"symmetric": True}]}},
            )  # fmt: skip


@pytest.mark.ort(178)
def test_keywords_of_older_versions_are_accepted() -> None:
    arguments = (conv_relu(), False, False, INT8, UINT8, None, [], [], [])
    assert BaseQuantizer(*arguments, static=True, mode=1).quantize_model.__name__
    with pytest.raises(TypeError, match="statik"):
        BaseQuantizer(*arguments, statik=True)
    with pytest.raises(NotImplementedError):
        BaseQuantizer(*arguments).quantize_model()


@pytest.mark.ort(55, 104, "G68")
@pytest.mark.parametrize("enabled", [False, True])
def test_ranges_in_a_body_are_narrowed_with_it(enabled: bool) -> None:
    """The incumbent looks at the nodes of the main graph only."""
    nodes = [
        helper.make_node("Neg", ["x"], ["n"], "neg"),
        helper.make_node("Relu", ["n"], ["r"], "relu"),
    ]
    value = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xry"}
    body = helper.make_graph(nodes, "body", [], [value["r"]])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    branch = helper.make_node("If", ["flag"], ["y"], "if", then_branch=body, else_branch=body)
    model = helper.make_model(
        helper.make_graph([branch], "g", [flag, value["x"]], [value["y"]]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    ends = {name: (np.float32(-5), np.float32(5)) for name in "xn"}
    data = TensorsData(CalibrationMethod.MinMax, {**ends, "r": (np.float32(0), np.float32(5))})
    options = {"EnableSubgraph": enabled}
    arguments = (model, False, False, INT8, UINT8, data, [], [], ["Neg", "Relu"], options)
    quantizer = BaseQuantizer(*arguments)
    quantizer.adjust_tensor_ranges()
    assert quantizer.tensors_range["n"].range_value == ((0, 5) if enabled else (-5, 5))


@pytest.mark.ort(7, 8, 9, "G75")
def test_a_reason_is_known_for_each_node_that_is_left() -> None:
    """The incumbent answers True or False."""
    arguments = (conv_relu(), False, False, INT8, UINT8, None)
    nodes = conv_relu().graph.node
    for chosen, excluded, types, reason in (
        (["relu"], [], ["Conv"], "not in nodes_to_quantize"),
        ([], ["conv"], ["Conv"], "in nodes_to_exclude"),
        ([], [], ["Relu"], "operator type not in op_types_to_quantize"),
        ([], [], ["Conv"], None),
    ):
        assert (
            BaseQuantizer(*arguments, chosen, excluded, types).reason_to_leave(nodes[0]) == reason
        )
