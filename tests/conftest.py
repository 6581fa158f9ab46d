"""Settings for every test, and small float models that go through the whole pipeline."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import qwrap

# Test processes run side by side; threads of one that wait spinning starve the others.
torch.set_num_threads(1)

Shape = tuple[int, ...]


def build_model(
    nodes: str,
    weights: Mapping[str, Shape | np.ndarray],
    inputs: str = "float[N,3,8,8] x",
    outputs: str = "float[N,M,H,W] y",
    opset: int = 13,
) -> onnx.ModelProto:
    """A model in ONNX's text form; every node is named after its first output.

    A weight is an array, or a shape to fill with seeded normal values.
    """
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> small ({inputs}) => ({outputs}) {{{nodes}}}'
    )
    name_nodes(model.graph)
    rng = np.random.default_rng(5)
    for name, value in weights.items():
        drawn = rng.normal(0, 0.3, value) if isinstance(value, tuple) else value
        array = drawn.astype(np.float32) if drawn.dtype == np.float64 else drawn
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def name_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = f"/{node.output[0]}"
        if not node.domain:
            node.ClearField("domain")  # as exporters write it; the parser sets it to ""
        for attribute in node.attribute:
            name_nodes(attribute.g)


def session(path: Path, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if optimised is not None:
        options.optimized_model_filepath = os.fspath(optimised)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of the optimised file."""
    opened = session(path)
    names = [i.name for i in opened.get_inputs()]
    return opened.run(None, dict(zip(names, inputs, strict=True)))


@dataclass
class Quantized:
    """A small model after calibration, and the file exported from it."""

    model: qwrap.WrappedModel
    source: onnx.ModelProto
    path: Path
    batches: Sequence[object]

    def file(self) -> onnx.ModelProto:
        return onnx.load(self.path)

    def operators(self) -> Counter[str]:
        """Operators of the graph that onnxruntime runs, those in branches included."""
        optimised = self.path.with_suffix(".optimised.onnx")
        session(self.path, optimised)
        return count_operators(onnx.load(optimised).graph)

    def verify(self) -> qwrap.verify.VerifyReport:
        return qwrap.verify(self.model, self.path, self.batches, progress=False)


def count_operators(graph: onnx.GraphProto) -> Counter[str]:
    found: Counter[str] = Counter()
    for node in graph.node:
        found[node.op_type] += 1
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += count_operators(attribute.g)
    return found


def make_batches(count: int = 3, shape: Shape = (2, 3, 8, 8), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, shape).astype(np.float32) for _ in range(count)]


def quantize_model(
    folder: Path,
    source: onnx.ModelProto,
    batches: Sequence[object] | None = None,
    config: qwrap.QConfig | None = None,
) -> Quantized:
    batches = make_batches() if batches is None else batches
    model = qwrap.load(source).eval()
    qwrap.prepare(model, config or qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(model, batches, progress=False)
    path = folder / "small.int8.onnx"
    qwrap.export(model, path)
    return Quantized(model, source, path, batches)


class Small:
    """What tests make models with."""

    build = staticmethod(build_model)
    batches = staticmethod(make_batches)
    run = staticmethod(run)
    session = staticmethod(session)
    operators = staticmethod(count_operators)

    # Two convolutions with a Relu between; most claims need no more.
    def convs(self, **changes: object) -> onnx.ModelProto:
        nodes = (
            "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w2, b2)"
        )
        weights = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (4, 6, 3, 3), "b2": (4,)}
        return build_model(nodes, weights, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., Quantized]:
    """``quantized(source, batches=None, config=None)``: calibrated and exported."""
    return partial(quantize_model, tmp_path)
