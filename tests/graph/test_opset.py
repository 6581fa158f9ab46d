"""Raising the opset: the same function, the same names, only what has to change."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwrap.errors import ExportError
from qwrap.graph.index import walk_nodes
from qwrap.graph.opset import COMPATIBLE, REFUSED, raise_opset, revisions
from qwrap.graph.opset_adapters import ADAPTERS

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[2] / "../shared"))
OLD_MODELS = {
    "mnist_cntk": {"Input3": (1, 1, 28, 28)},
    "nanodet_m_320": (1, 3, 320, 320),
    "espnetv2_s2_voc_256": (1, 3, 256, 256),
    "super_resolution": (1, 1, 224, 224),
    "ppocr_en_number_rec": (1, 3, 48, 96),
}
Feeds = dict[str, np.ndarray[Any, Any]]


def run(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(feeds))


def raised(model: onnx.ModelProto, target: int) -> tuple[onnx.ModelProto, list[str]]:
    edited = ir.from_proto(model)
    lines = raise_opset(edited, target)
    proto = ir.to_proto(edited)
    onnx.checker.check_model(proto, full_check=True)
    assert {o.domain: o.version for o in proto.opset_import}[""] == target
    return proto, lines


def assert_equal(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@pytest.mark.parametrize("target", [13, 21])
@pytest.mark.parametrize("name", OLD_MODELS)
def test_a_real_model_computes_the_same_bits(name: str, target: int) -> None:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    before = onnx.load(path)
    constant = {t.name for t in before.graph.initializer}
    (graph_input,) = (v for v in before.graph.input if v.name not in constant)
    shape = OLD_MODELS[name]
    shape = next(iter(shape.values())) if isinstance(shape, dict) else shape
    feeds = {graph_input.name: np.random.default_rng(0).random(shape, np.float32)}
    after, _ = raised(before, target)
    assert_equal(run(before, feeds), run(after, feeds))
    # Names stay, and a node that no line names is the same bytes.
    old = {n.output[0]: n for n in before.graph.node}
    new = {n.output[0]: n for n in after.graph.node}
    assert [n.name for n in before.graph.node] == [new[o].name for o in old]
