"""Messages that are read without a copy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import qwrap
from qwrap.errors import ModelError
from qwrap.graph import Borrowed


def product() -> onnx.ModelProto:
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    nodes = [helper.make_node(op, ["x", "w"], [out]) for op, out in (("MatMul", "a"), ("Add", "b"))]
    nodes[1].input[:] = ["a", "c"]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[0], "c")]
    ends = [helper.make_tensor_value_info(n, 1, ["N", s]) for n, s in (("x", 4), ("b", 3))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("untie", [False, True])
def test_a_borrowed_message_computes_the_same_and_training_does_not_change_it(untie: bool) -> None:
    message = product()
    before = message.SerializeToString(deterministic=True)
    model = qwrap.load(Borrowed(message), untie=untie)
    x = torch.randn(2, 4)
    assert torch.equal(model(x), qwrap.load(product())(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert message.SerializeToString(deterministic=True) == before


def test_what_is_wrong_with_a_borrowed_message_is_said() -> None:
    message = product()
    message.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        qwrap.load(Borrowed(message))
