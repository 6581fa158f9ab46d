"""What some readers get in another type is compared too."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import numpy_helper

import qwrap

NODES = "t = Sigmoid(x) a = Cos(t) b = Sin(t) c = Tanh(t)"


def source_of(small: Any, *outputs: str) -> onnx.ModelProto:
    return small.build(NODES, {}, outputs=", ".join(f"float[N,A,B,C] {name}" for name in outputs))


def config_of(*asked: tuple[list[str], str]) -> qwrap.QConfig:
    config = qwrap.QConfig(scope="all")
    for nodes, kind in asked:
        config.set(nodes, activation=kind)
    return config


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([(["/a", "/b"], "uint16")], {"t_convert": "uint16"}),
        ([(["/a", "/b", "/c"], "int8")], {"t_convert": "int8"}),
        ([(["/a"], "uint16"), (["/b"], "int8")], {"t_convert_uint16": "uint16",
                                                  "t_convert_int8": "int8"}),
        ([(["/a"], "int5")], {"t_convert": "int5"}),  # a function in the file
        ([(["/t"], "uint16")], {"t_convert": "uint8"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("isolated", "outputs"), [(False, ("a", "b", "c", "t")), (True, ("a", "b", "c"))]
)
def test_conversions_are_compared_by_the_names_of_the_plan(
    small: Any,
    quantized: Any,
    outputs: tuple[str, ...],
    asked: list[tuple[list[str], str]],
    expected: dict[str, str],
    isolated: bool,
) -> None:
    result = quantized(source_of(small, *outputs), config=config_of(*asked))
    report = qwrap.verify(
        result.model, result.path, result.batches, isolated=isolated, progress=False
    )
    assert not report.skipped
    for level in (report.specification, report.deployed):
        found = {tensor.name: tensor.dtype for tensor in level.tensors if "_convert" in tensor.name}
        assert found == expected
        # Sigmoid in 16 bit: torch and onnxruntime round one value of a thousand differently.
        assert level.fraction < 1e-3
        assert level.worst_step <= 1
        assert {tensor.elements for tensor in level.tensors} == {3 * 2 * 3 * 8 * 8}
    assert expected.keys() == {conversion.key for _, conversion in result.model.plan.conversions()}


@pytest.mark.ort(358)
def test_a_wrong_scale_of_a_conversion_is_seen_at_the_conversion(
    small: Any, quantized: Any
) -> None:
    result = quantized(source_of(small, "a", "b", "c"), config=config_of((["/a"], "int4")))
    file = result.file()
    for init in file.graph.initializer:
        if init.name == "t_scale_convert":
            init.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(init) * 1.1, init.name))
    onnx.save(file, result.path)
    report = result.verify()
    for level in (report.specification, report.deployed):
        assert level.first_differing == "t_convert"


def test_a_conversion_for_a_node_that_the_model_lacks_is_said_to_be_so(
    small: Any, quantized: Any
) -> None:
    result = quantized(source_of(small, "a", "b", "c"), config=config_of((["/a"], "int8")))
    file = result.file()
    for node in file.graph.node:
        node.name = {"/a": "other"}.get(node.name, node.name)
        node.output[:] = [{"a_float": "other"}.get(name, name) for name in node.output]
        node.input[:] = [{"a_float": "other"}.get(name, name) for name in node.input]
    onnx.save(file, result.path)
    (skipped,) = result.verify().skipped
    assert skipped.reason == "is converted for nodes that the float model does not have"


def test_a_conversion_that_the_model_does_not_make_is_said_to_be_so(
    small: Any, quantized: Any
) -> None:
    mixed = quantized(source_of(small, "a", "b", "c"), config=config_of((["/a"], "int8")))
    model = qwrap.load(mixed.source)
    qwrap.prepare(model, qwrap.QConfig(scope="all"))
    qwrap.calibrate(model, mixed.batches, progress=False)
    report = qwrap.verify(model, mixed.path, mixed.batches, progress=False)
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("t_convert", "the model does not compute it")
    ]
