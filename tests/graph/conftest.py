"""Small models for the tests of reading."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import pytest
from onnx import TensorProto, helper

Build = Callable[..., onnx.ModelProto]


@pytest.fixture
def build() -> Build:
    """Make a model of float32 graph inputs; ``outputs`` get their type from inference."""

    def build(
        nodes: Sequence[onnx.NodeProto],
        inputs: dict[str, Sequence[int | str]] | None = None,
        outputs: Sequence[str] = ("y",),
        initializers: Sequence[TensorProto] = (),
        opset: int = 17,
    ) -> onnx.ModelProto:
        given = {"x": [2, 3]} if inputs is None else inputs
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in given.items()],
            [onnx.ValueInfoProto(name=n) for n in outputs],
            initializers,
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    return build
