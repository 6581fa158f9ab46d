"""Sequences and optionals, in models that onnxruntime runs too."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qwrap.backend import prepare
from qwrap.ops.sequence import sequence_at, sequence_erase, sequence_insert

FLOATS = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
A, B = np.arange(6, dtype=np.float32).reshape(2, 3), -np.ones((1, 3), np.float32)


def model(nodes: Sequence[onnx.NodeProto], outputs: dict[str, onnx.TypeProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in "ab"],
        [helper.make_value_info(name, kind) for name, kind in outputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def constant(name: str, value: int | list[int]) -> onnx.NodeProto:
    key = "value_ints" if isinstance(value, list) else "value_int"
    return helper.make_node("Constant", [], [name], **{key: value})


def check(proto: onnx.ModelProto) -> None:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {"a": A, "b": B})
    for ours, theirs in zip(prepare(proto).run([A, B]), expected, strict=True):
        if isinstance(theirs, list):
            assert len(ours) == len(theirs)
        for one, other in zip(
            *((ours, theirs) if isinstance(theirs, list) else ([ours], [theirs])), strict=True
        ):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("position", [0, 1, -1, -2, None])
def test_insert_erase_and_at_agree_with_onnxruntime(position: int | None) -> None:
    where = [] if position is None else ["p"]
    nodes = [
        helper.make_node("SequenceConstruct", ["a", "b"], ["s"]),
        *([] if position is None else [constant("p", position)]),
        helper.make_node("SequenceInsert", ["s", "b", *where], ["t"]),
        helper.make_node("SequenceErase", ["t", *where], ["u"]),
        helper.make_node("SequenceLength", ["t"], ["n"]),
        constant("zero", 0),
        helper.make_node("SequenceAt", ["u", *(where or ["zero"])], ["first"]),
    ]
    floats = helper.make_sequence_type_proto(FLOATS)
    count = helper.make_tensor_type_proto(TensorProto.INT64, [])
    check(model(nodes, {"t": floats, "u": floats, "n": count, "first": FLOATS}))


@pytest.mark.parametrize(  # onnxruntime fails at a number together with keepdims=0
    ("split", "keepdims"),
    [(None, 0), (None, 1), (1, 1), (2, 1), ([2, 1], 1), ([1, 1, 1], 0)],
)
def test_split_and_concat_agree_with_onnxruntime(
    split: int | list[int] | None, keepdims: int
) -> None:
    given = [] if split is None else ["split"]
    nodes = [
        *([] if split is None else [constant("split", split)]),
        helper.make_node("SplitToSequence", ["a", *given], ["s"], axis=-1, keepdims=keepdims),
    ]
    outputs = {"s": helper.make_sequence_type_proto(FLOATS)}
    if keepdims or split is not None:
        nodes.append(helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=1))
        outputs["c"] = FLOATS
    else:
        nodes.append(helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=-1, new_axis=1))
        outputs["c"] = FLOATS
    check(model(nodes, outputs))


def test_a_sequence_that_grows_from_nothing_agrees_with_onnxruntime() -> None:
    nodes = [
        helper.make_node("SequenceEmpty", [], ["s"]),
        helper.make_node("SequenceInsert", ["s", "a"], ["t"]),
    ]
    check(model(nodes, {"t": helper.make_sequence_type_proto(FLOATS)}))


def test_an_optional_that_holds_something_gives_it() -> None:
    nodes = [
        helper.make_node("Optional", ["a"], ["o"]),
        helper.make_node("OptionalHasElement", ["o"], ["has"]),
        helper.make_node("OptionalGetElement", ["o"], ["y"]),
    ]
    check(model(nodes, {"has": helper.make_tensor_type_proto(TensorProto.BOOL, []), "y": FLOATS}))


def test_a_sequence_is_not_changed_and_gradients_flow_through_it() -> None:
    parts = [torch.ones(2, requires_grad=True), torch.zeros(2)]
    more = sequence_insert(parts, torch.full((2,), 3.0), 0)
    assert len(parts) == 2
    sequence_at(sequence_erase(more, 2), 1).sum().backward()
    assert parts[0].grad is not None
    assert parts[0].grad.tolist() == [1, 1]


@pytest.mark.parametrize("position", [3, -4])
def test_a_position_outside_of_the_sequence_raises(position: int) -> None:
    match = f"position {position} in a sequence of 2 tensors"
    with pytest.raises(IndexError, match=match):
        sequence_at([torch.ones(1), torch.ones(1)], position)
    with pytest.raises(IndexError, match=match):
        sequence_insert([torch.ones(1), torch.ones(1)], torch.ones(1), position)
