"""What attributes may hold, and that loading says so of every node."""

from __future__ import annotations

import math

import onnx
import pytest
from onnx import TensorProto, helper

import qwrap
from qwrap import ops
from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.ops.limits import COMMON, at_least, one_of

MICROSOFT = "com.microsoft"
TWO_OUTPUTS = ("CausalConvWithState", "LinearAttention")
HEADS = {"q_num_heads": 2, "kv_num_heads": 2}
REFUSED = [
    (
        "BitShift",
        11,
        2,
        {"direction": "UP"},
        r"direction='UP'; expected one of \['LEFT', 'RIGHT'\]",
    ),
    ("Cast", 24, 1, {"to": 1, "round_mode": "even"}, "round_mode='even'"),
    ("Cast", 24, 1, {"to": 99}, "to=99"),
    ("CastLike", 24, 2, {"round_mode": "even"}, "round_mode='even'"),
    ("Conv", 13, 2, {"auto_pad": "SAME"}, "auto_pad='SAME'"),
    ("Conv", 13, 2, {"strides": [1, 0]}, r"strides=\[1, 0\]; expected 1 to 2147483647"),
    ("Conv", 13, 2, {"auto_pad": "VALID", "pads": [1] * 4}, "with pads="),
    ("Flatten", 13, 1, {"axis": 2**40}, "axis=1099511627776; expected -64 to 63"),
    ("Conv", 13, 2, {"group": 0}, "group=0"),
    ("DepthToSpace", 13, 1, {"blocksize": 0}, "blocksize=0"),
    ("DepthToSpace", 13, 1, {"blocksize": 2, "mode": "RCD"}, "mode='RCD'"),
    ("Dropout", 6, 1, {"is_test": 0}, "is_test=0"),
    ("Dropout", 6, 1, {}, "is_test=0"),
    ("GRU", 14, 3, {"hidden_size": 3, "direction": "backward"}, "direction='backward'"),
    ("GatherND", 13, 2, {"batch_dims": -7}, "batch_dims=-7"),
    ("Gelu", 20, 1, {"approximate": "erf"}, "approximate='erf'"),
    ("GridSample", 16, 2, {"mode": "cubic"}, "mode='cubic'"),
    ("GridSample", 20, 2, {"mode": "bilinear"}, "mode='bilinear'"),
    ("GridSample", 20, 2, {"padding_mode": "wrap"}, "padding_mode='wrap'"),
    ("ImageDecoder", 20, 1, {"pixel_format": "CMYK"}, "pixel_format='CMYK'"),
    ("LSTM", 14, 3, {"hidden_size": 3, "activations": ["Tanh"]}, "are 1; expected 3"),
    ("LSTM", 14, 3, {"hidden_size": 3, "clip": 0.0}, "clip=0.0; expected more than 0"),
    ("LayerNormalization", 17, 2, {"stash_type": 7}, "stash_type=7"),
    ("LinearAttention", 27, 3, {**HEADS, "update_rule": "sum"}, "update_rule='sum'"),
    ("CausalConvWithState", 27, 2, {"activation": "relu"}, "activation='relu'"),
    ("LeakyRelu", 16, 1, {"alpha": math.nan}, "alpha=nan"),
    ("LpNormalization", 22, 1, {"p": 3}, "p=3"),
    ("LpPool", 22, 1, {"kernel_shape": [2], "p": 0}, "p=0"),
    ("MaxPool", 12, 1, {"kernel_shape": [2, 2], "storage_order": 2}, "storage_order=2"),
    ("NegativeLogLikelihoodLoss", 13, 2, {"reduction": "max"}, "reduction='max'"),
    ("Pad", 10, 1, {"pads": [0, 0], "mode": "wrap"}, "mode='wrap'"),
    ("RNN", 14, 3, {"hidden_size": 3, "activations": ["Sine"]}, "activation 'sine' is none of"),
    ("ReduceMax", 13, 1, {"keepdims": 2}, "keepdims=2"),
    ("Resize", 13, 3, {"coordinate_transformation_mode": "pixel"}, "mode='pixel'"),
    ("Resize", 13, 3, {"mode": "area"}, "mode='area'"),
    ("Resize", 19, 3, {"keep_aspect_ratio_policy": "crop"}, "policy='crop'"),
    ("Resize", 19, 3, {"nearest_mode": "away"}, "nearest_mode='away'"),
    ("RoiAlign", 16, 3, {"coordinate_transformation_mode": "pixel"}, "mode='pixel'"),
    ("RoiAlign", 16, 3, {"mode": "min"}, "mode='min'"),
    ("ScatterElements", 18, 3, {"reduction": "mean"}, "reduction='mean'"),
    ("SoftmaxCrossEntropyLoss", 13, 2, {"reduction": "max"}, "reduction='max'"),
    ("TensorScatter", 24, 2, {"mode": "ring"}, "mode='ring'"),
]
CONTRIB = [
    ("Attention", 2, {"num_heads": 1, "do_rotary": 1}, "do_rotary=1"),
    ("CDist", 2, {"metric": "cosine"}, "metric='cosine'"),
    ("CropAndResize", 4, {"mode": "cubic"}, "mode='cubic'"),
    ("FusedConv", 2, {"activation": "Sine"}, "activation='Sine'"),
    ("FusedGemm", 2, {"activation": "Sine"}, "activation='Sine'"),
    ("GroupQueryAttention", 13, {"num_heads": 1, "kv_num_heads": 1}, "has an input 'k_scale'"),
    (
        *("GroupQueryAttention", 7),
        {"num_heads": 1, "kv_num_heads": 1, "sliding_window_cache": 1},
        "sliding_window_cache=1",
    ),
    ("IsAllFinite", 1, {"isinf_only": 1, "isnan_only": 1}, "both isinf_only and isnan_only"),
    (
        *("MatMulNBits", 3),
        {"K": 32, "N": 1, "block_size": 32, "weight_prepacked": 1},
        "weight_prepacked=1",
    ),
    ("MatMulNBits", 3, {"K": 32, "N": 1, "block_size": 32, "bits": 3}, "bits=3"),
    ("MoE", 3, {"activation_type": "sine"}, "activation_type='sine'"),
    ("MoE", 3, {"use_sparse_mixer": 1}, "use_sparse_mixer=1"),
    ("MultiHeadAttention", 10, {"num_heads": 1}, "has an input 'cache_indirection'"),
    ("QAttention", 5, {"num_heads": 1, "do_rotary": 1}, "do_rotary=1"),
    (
        *("QAttention", 5),
        {"num_heads": 1, "past_present_share_buffer": 1},
        "past_present_share_buffer=1",
    ),
    ("Rfft", 1, {"normalized": 1}, "normalized=1"),
    ("Rfft", 1, {"onesided": 0}, "onesided=0"),
]


def model(nodes: list[onnx.NodeProto], opset: int) -> onnx.ModelProto:
    """Return nodes on inputs of which nothing is known."""
    names = sorted({name for node in nodes for name in node.input})
    outputs = [name for node in nodes for name in node.output]
    graph = helper.make_graph(
        nodes,
        "limits",
        [onnx.ValueInfoProto(name=name) for name in names],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports)


def node(op_type: str, inputs: int, *, name: str = "n", **attributes: object) -> onnx.NodeProto:
    names = [f"x{i}" for i in range(inputs)]
    outputs = [f"{name}_y", *([f"{name}_z"] if op_type in TWO_OUTPUTS else [])]
    return helper.make_node(op_type, names, outputs, name=name, **attributes)


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes", "message"), REFUSED)
def test_loading_refuses_what_no_function_can_follow(
    op_type, opset, inputs, attributes, message
) -> None:
    with pytest.raises(UnsupportedOpError, match=rf"node 'n' \({op_type}\): .*{message}"):
        qwrap.load(model([node(op_type, inputs, **attributes)], opset))


@pytest.mark.parametrize(("op_type", "inputs", "attributes", "message"), CONTRIB)
def test_loading_refuses_what_no_function_of_com_microsoft_can_follow(
    op_type, inputs, attributes, message
) -> None:
    wrong = node(op_type, inputs, domain=MICROSOFT, **attributes)
    with pytest.raises(UnsupportedOpError, match=rf"node 'n' \({op_type}\): .*{message}"):
        qwrap.load(model([wrong], 17))


def test_one_error_lists_every_node_and_what_is_missing() -> None:
    nodes = [
        node("BitShift", 2, name="shift", direction="UP"),
        node("Gelu", 1, name="gelu", approximate="erf"),
        node("Rfft", 1, name="rfft", domain=MICROSOFT, onesided=0, normalized=1),
        node("Nothing", 1, name="nothing"),
    ]
    nodes[3].domain = MICROSOFT + ".unknown"
    proto = model(nodes, 20)
    proto.opset_import.add(domain=nodes[3].domain, version=1)
    with pytest.raises(ModelError) as caught:
        qwrap.load(proto)
    for text in ("'shift'", "'gelu'", "'rfft'", "onesided=0", "normalized=1"):
        assert text in str(caught.value)


def test_a_refused_node_hides_no_wrong_type_of_another() -> None:
    x = helper.make_tensor_value_info("x0", TensorProto.STRING, [2])
    proto = model([node("Gelu", 1, name="a", approximate="erf"), node("Abs", 1, name="b")], 20)
    proto.graph.input[0].CopyFrom(x)
    with pytest.raises(ModelError, match=r"'b' \(Abs\): input 'X'.*'a' \(Gelu\): approximate"):
        qwrap.load(proto)


def test_nodes_inside_of_functions_are_refused_by_name() -> None:
    body = [helper.make_node("Gelu", ["a"], ["b"], name="inner", approximate="erf")]
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function("own", "F", ["a"], ["b"], body, opsets)
    proto = model([node("F", 1)], 20)
    proto.graph.node[0].domain = "own"
    proto.opset_import.add(domain="own", version=1)
    proto.functions.append(function)
    with pytest.raises(UnsupportedOpError, match=r"node 'inner' \(Gelu\): approximate='erf'"):
        qwrap.load(proto)


def test_every_default_is_allowed() -> None:
    wrong = []
    for schema in onnx.defs.get_all_schemas_with_history():
        operator = ops.find(schema.domain, schema.name, schema.since_version)
        for name, attribute in schema.attributes.items() if operator is not None else ():
            if name in operator.allowed and attribute.default_value.name:
                value = helper.get_attribute_value(attribute.default_value)
                value = value.decode() if isinstance(value, bytes) else value
                value = "forward" if value == "foward" else value  # a slip in opset 1
                if not operator.allowed[name].allows(value):
                    wrong.append((schema.name, schema.since_version, name, value))
    assert not wrong


def test_limits_of_lists_are_those_of_their_elements() -> None:
    assert at_least(1).allows([1, 2])
    assert not at_least(1).allows([1, 0])
    assert not one_of("a").allows(["a", "b"])
    assert not COMMON["alpha"].allows(math.inf)


def test_an_attribute_that_does_not_fit_the_rank_is_named_with_its_node() -> None:
    nodes = [
        helper.make_node("Concat", ["x", "x"], ["a"], name="joined", axis=9),
        helper.make_node("Flatten", ["x"], ["b"], name="flat", axis=7),
        helper.make_node("Conv", ["x", "w"], ["c"], name="convolved", kernel_shape=[3, 5]),
    ]
    proto = model(nodes, 20)
    del proto.graph.input[:]
    for name, shape in (("x", [1, 2, 8, 8]), ("w", [4, 2, 3, 3])):
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    with pytest.raises(ModelError, match=r"'convolved' \(Conv\): kernel_shape=\[3, 5\]"):
        qwrap.load(proto)
    del proto.graph.node[2], proto.graph.output[2], proto.graph.input[1]
    with pytest.raises(ModelError, match=r"'joined' \(Concat\): axis .*'flat' \(Flatten\)"):
        qwrap.load(proto)


def test_what_a_whole_model_says_wrongly_is_said_once() -> None:
    nodes = [
        helper.make_node("DepthToSpace", ["x"], ["a"], "value", blocksize=2, mode="ABC"),
        helper.make_node("Conv", ["i", "x"], ["y"], "type"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 2]),
        helper.make_tensor_value_info("i", TensorProto.INT64, [1, 4, 2, 2]),
    ]
    outputs = [onnx.ValueInfoProto(name="y")]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 17)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    with pytest.raises(ModelError) as caught:
        qwrap.load(proto)
    assert str(caught.value).count("mode='ABC'") == 1
    assert str(caught.value).count("'type' (Conv)") == 1
