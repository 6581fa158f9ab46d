"""Small models, the shared real ones, and what onnxruntime makes of them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qwrap.model import WrappedModel

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="session")
def samples() -> Any:
    """The module that knows the shared models and their inputs."""
    if not (SHARED / "data" / "load.py").exists():
        pytest.skip("needs the folder of shared models and data beside the checkout")
    sys.path.insert(0, str(SHARED / "data"))
    return importlib.import_module("load")


@pytest.fixture
def build() -> Callable[..., onnx.ModelProto]:
    """Make a model; initialisers are arrays by name, inputs are shapes or (type, shape)."""

    def build(
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, Any],
        outputs: Sequence[str] = ("y",),
        initializers: Mapping[str, np.ndarray] | None = None,
        opset: int = 17,
        extra: Sequence[onnx.OperatorSetIdProto] = (),
    ) -> onnx.ModelProto:
        kinds = {
            k: v if isinstance(v, tuple) else (TensorProto.FLOAT, v) for k, v in inputs.items()
        }
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(a, name) for name, a in (initializers or {}).items()],
        )
        opsets = [helper.make_opsetid("", opset), *extra]
        return onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opsets, ir_version=8)
        )

    return build


@pytest.fixture
def run_ort() -> Callable[[onnx.ModelProto | str, Arrays], list[np.ndarray]]:
    """Run a model in onnxruntime without optimisation, the plain meaning of its nodes."""

    def run(model: onnx.ModelProto | str, feed: Arrays) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        source = model if isinstance(model, str) else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(feed)))

    return run


@pytest.fixture
def run_qwrap() -> Callable[[WrappedModel, Arrays], list[np.ndarray]]:
    """Run a wrapped model on arrays."""

    def run(model: WrappedModel, feed: Arrays) -> list[np.ndarray]:
        with torch.no_grad():
            result = model(**{name: torch.from_numpy(np.array(a)) for name, a in feed.items()})
        return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]

    return run
