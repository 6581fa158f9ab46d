"""What an attribute may say."""

import re

import onnx
import pytest
from onnx import TensorProto, helper

import qwrap
from qwrap.errors import UnsupportedOpError
from qwrap.ops.choices import CHOICES


def model(op_type: str, **attributes: str) -> onnx.ModelProto:
    nodes = [
        helper.make_node(op_type, ["x", "y"], [f"z{i}"], name=f"n{i}", **attributes)
        for i in range(2)
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in ("x", "y")]
    outputs = [helper.make_tensor_value_info("z1", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "choices", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(("op_type", "name"), [("Conv", "auto_pad"), ("Resize", "mode")])
def test_loading_names_every_node_with_an_unknown_value(op_type: str, name: str) -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        qwrap.load(model(op_type, **{name: "sideways"}))
    for node in ("n0", "n1"):
        complaint = rf"node '{node}' \({op_type}\): {name}='sideways' is none of"
        assert re.search(complaint, str(caught.value))


def test_every_choice_belongs_to_an_attribute_with_that_default() -> None:
    for (op_type, name), choices in CHOICES.items():
        for schema in onnx.defs.get_all_schemas_with_history():
            if schema.name == op_type and name in schema.attributes:
                default = schema.attributes[name].default_value
                written = default.s.decode().replace("foward", "forward")  # a slip in opset 1
                assert not written or written in choices
