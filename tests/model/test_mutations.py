"""Nodes of the backend suite with one attribute changed: refused, or computed like onnxruntime."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import AttributeProto, helper, numpy_helper

from qwrap import backend
from qwrap.errors import QwrapError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the suite overflows on purpose as it makes its data
    from onnx.backend.test.loader import load_model_tests

COUNT = 800
LARGE = 2**40
NUMBERS = (-7, -1, 0, 1, 2, 3, 99, LARGE)

# Drawn at random, or not computed at all by the version of onnxruntime that the rest is held to.
SKIPPED = frozenset((
    *("Bernoulli", "Constant", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike"),
    *("Loop", "If", "Scan"),
))

# What ONNX says and qwrap computes, and onnxruntime's kernels do not take.
BEYOND = frozenset((
    *((op_type, "layout") for op_type in ("GRU", "LSTM", "RNN")),
    *((op_type, "pads") for op_type in ("AveragePool", "LpPool", "MaxPool")),  # a whole kernel
    ("RNN", "activations"),  # more than are used
    ("SplitToSequence", "keepdims"),
    ("StringNormalizer", "is_case_sensitive"),  # a locale that is not installed
    ("CastLike", "saturate"),  # to a type that has nothing to saturate
    ("ConvTranspose", "output_padding"),  # up to the dilation, not the stride
    *(("LRN", name) for name in ("alpha", "beta", "size")),  # not positive, or even
    *(("Resize", name) for name in ("antialias", "exclude_outside")),
))


def mutations(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[onnx.AttributeProto]:
    """Yield attributes to put in the place of those that the node has or leaves to the schema."""
    given = {a.name: a for a in node.attribute}
    for name, known in sorted(schema.attributes.items()):
        kind = getattr(AttributeProto, str(known.type).rpartition(".")[2])
        now = given.get(name, known.default_value)
        value = helper.get_attribute_value(now) if now.name else None
        for other in _others(kind, value):
            if other != value:
                yield helper.make_attribute(name, other, attr_type=kind)


def _others(kind: int, value: Any) -> list[Any]:
    if kind == AttributeProto.STRING:
        return ["sideways", "SAME_UPPER"]
    if kind == AttributeProto.INT:
        return [*NUMBERS]
    if kind == AttributeProto.FLOAT:
        return [-1.0, 0.0, float("nan")]
    if kind == AttributeProto.INTS:
        now = [*(value or [1])]
        lists = [[*now, 1], [-n or -1 for n in now], [0] * len(now), [LARGE] * len(now), now * 2]
        return [*lists, *([now[:-1]] if len(now) > 1 else [])]
    if kind == AttributeProto.STRINGS:
        return [[*(value or []), b"sideways"], [b"sideways"] * len(value or [b""])]
    return []


def changed(model: onnx.ModelProto, attribute: onnx.AttributeProto) -> onnx.ModelProto:
    """Return a model of one node with another attribute, and outputs of whatever shape."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (node,) = copy.graph.node
    kept = [a for a in node.attribute if a.name != attribute.name]
    del node.attribute[:]
    node.attribute.extend([*kept, attribute])
    for value in copy.graph.output:
        value.ClearField("type")
    return copy


def cases() -> list[tuple[onnx.ModelProto, list[np.ndarray], onnx.AttributeProto]]:
    """Return every change of a node that onnxruntime has a kernel for, and inputs for it."""
    found = []
    seen = set()
    for case in load_model_tests(kind="node"):
        model, data = case.model, case.data_sets
        if model is None or not data or len(model.graph.node) != 1:
            continue
        (node,) = model.graph.node
        key = (node.op_type, len(node.input), *sorted(a.name for a in node.attribute))
        if node.domain or node.op_type in SKIPPED or key in seen:
            continue
        seen.add(key)
        schema = onnx.defs.get_schema(node.op_type, model.opset_import[0].version)
        inputs = [
            numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x for x in data[0][0]
        ]
        if all(isinstance(x, np.ndarray) for x in inputs):  # no sequences
            found += [(model, inputs, attribute) for attribute in mutations(node, schema)]
    return found


def by_qwrap(model: onnx.ModelProto, inputs: list[np.ndarray]) -> list[Any] | None:
    """Return what qwrap computes, None if it refuses to load the model or fails to run it."""
    try:
        program = backend.prepare(model)
    except QwrapError:
        return None  # anything else that loading raises is a mistake
    try:
        return [*program.run(inputs)]
    except Exception:
        return None


def by_onnxruntime(model: onnx.ModelProto, inputs: list[np.ndarray]) -> list[Any] | str:
    """Return what onnxruntime computes, or why it does not."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = ort.InferenceSession(model.SerializeToString(), options)
        names = [value.name for value in model.graph.input]
        return [*session.run(None, dict(zip(names, inputs, strict=True)))]
    except Exception as error:
        return str(error)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) or isinstance(theirs, list) or theirs is None:
        return True  # sequences and optionals are compared elsewhere
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return False
    if theirs.dtype.kind in "OSU":
        return bool((ours.astype(str) == theirs.astype(str)).all())
    if theirs.dtype.kind == "f":  # masked scores: the lowest number to one, infinite to the other
        ours, theirs = ours.clip(-6e4), theirs.clip(-6e4)
    half = theirs.dtype.itemsize < 4  # a unit in the last place of float16, or one code
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    size = np.abs(theirs[np.isfinite(theirs)]).max(initial=1.0)
    # A sum of large numbers may be small: what counts is the size of the largest.
    slack = size * (4e-3 if half else 1e-5)
    return bool(np.allclose(ours, theirs, rtol=2e-3 if half else 1e-4, atol=slack, equal_nan=True))


def silently_wrong(
    model: onnx.ModelProto, inputs: list[np.ndarray], attribute: onnx.AttributeProto
) -> str | None:
    """Say what is wrong with how qwrap takes a changed attribute, None if nothing is."""
    (node,) = model.graph.node
    mutant = changed(model, attribute)
    ours = by_qwrap(mutant, inputs)
    if ours is None:  # and nobody asks onnxruntime, which some of these crash
        return None
    theirs, said = by_onnxruntime(mutant, inputs), helper.printable_attribute(attribute)
    where = f"{node.op_type} of {model.graph.name} with {said}"
    if isinstance(theirs, str):
        unknown = "NOT_IMPLEMENTED" in theirs or isinstance(by_onnxruntime(model, inputs), str)
        beyond = unknown or (node.op_type, attribute.name) in BEYOND
        return None if beyond else f"{where}: onnxruntime: {theirs}"
    if all(map(same, ours, theirs)) or (node.op_type, attribute.name) == ("TopK", "sorted"):
        return None
    return f"{where}: differs"


@pytest.fixture(scope="module")
def sample() -> list[tuple[onnx.ModelProto, list[np.ndarray], onnx.AttributeProto]]:
    return random.Random(1).sample(cases(), COUNT)


@pytest.mark.filterwarnings("ignore")  # of torch and numpy about NaN, of gradients that stop
def test_no_changed_attribute_is_silently_wrong(sample) -> None:
    wrong = [said for case in sample if (said := silently_wrong(*case))]
    assert not wrong, "\n".join(wrong)
