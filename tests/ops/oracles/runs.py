"""What onnxruntime and qwrap make of a variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import qwrap
from oracles.variants import SIZES, Arrays, Variant, build, inputs_of
from qwrap.model.tensors import to_array, to_value

NO_KERNEL = (
    "Could not find an implementation",
    "is till opset",  # the last one released when it was built
    "is under development",
    "InsertedPrecisionFreeCast",  # float16 before Cast took numbers for types
    "Batchwise recurrent operations",
    "is deprecated in domain_version",
)


class NoKernelError(Exception):
    """onnxruntime cannot run this operator, revision and type."""


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """An unoptimised session.

    Raises:
        NoKernelError: onnxruntime has no kernel for it.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (ort_errors.NotImplemented, ort_errors.Fail, ort_errors.InvalidGraph) as error:
        if any(text in str(error) for text in NO_KERNEL):
            raise NoKernelError(str(error)) from error
        raise


def feed_of(model: onnx.ModelProto, inputs: Arrays) -> dict[str, np.ndarray]:
    """The inputs that are graph inputs, by name."""
    names = {value.name for value in model.graph.input}
    return {f"x{i}": a for i, a in enumerate(inputs) if f"x{i}" in names and a is not None}


def assert_same(ours: Sequence[Any], theirs: Sequence[Any], variant: Variant) -> None:
    """Compare types, shapes and, unless random, values of all outputs."""
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        wanted = np.asarray(wanted)
        assert mine.shape == wanted.shape, f"shape {mine.shape}, onnxruntime has {wanted.shape}"
        if wanted.dtype.kind in "OU":
            np.testing.assert_array_equal(mine, wanted.astype(object))
            continue
        assert mine.dtype == wanted.dtype, f"type {mine.dtype}, onnxruntime has {wanted.dtype}"
        if variant.random:
            continue
        exact = wanted.dtype.kind != "f"
        np.testing.assert_allclose(
            mine, wanted, rtol=0 if exact else variant.rtol, atol=0 if exact else variant.atol
        )


def compare(op_type: str, revision: int, variant: Variant) -> None:
    """Compare qwrap with onnxruntime for two shapes, both static and dynamic.

    Raises:
        NoKernelError: onnxruntime cannot run the variant.
    """
    inputs = [inputs_of(variant, size) for size in SIZES]
    static = [build(op_type, revision, variant, [arrays], False) for arrays in inputs[:1]]
    dynamic = build(op_type, revision, variant, inputs, True)
    for model, sets in ((static[0], inputs[:1]), (dynamic, inputs)):
        session = session_of(model)
        wrapped = None
        for arrays in sets:
            feed = feed_of(model, arrays)
            theirs = session.run(None, feed)
            wrapped = wrapped or qwrap.load(model)
            assert_same(run(wrapped, list(feed.values())), theirs, variant)


def run(model: qwrap.WrappedModel, inputs: list[Any]) -> list[Any]:
    """What a wrapped model makes of arrays, as arrays."""
    graph, cpu = model.graph, torch.device("cpu")
    with torch.no_grad():
        results = model(
            *(to_value(a, graph.type_of(v), cpu) for a, v in zip(inputs, graph.inputs, strict=True))
        )
    results = results if len(graph.outputs) > 1 else (results,)
    return [to_array(r, graph.type_of(v)) for r, v in zip(results, graph.outputs, strict=True)]


def newest_opset() -> int:
    """The newest opset that onnxruntime runs."""
    variant = Variant(lambda _: [np.zeros(1, np.float32)])
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        try:
            session_of(build("Identity", opset, variant, [variant.make(0)], dynamic=False))
        except NoKernelError:
            continue
        return opset
    raise AssertionError("onnxruntime runs no opset")


NEWEST_OPSET = newest_opset()
