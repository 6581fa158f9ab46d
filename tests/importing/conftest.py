"""Networks that other tools quantize, and what onnxruntime makes of the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

import qwrap

NETWORK = """
a = Conv<pads=[1,1,1,1]>(x, w1, b1)
b = Relu(a)
c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)
d = Conv<pads=[1,1,1,1], group=6>(c, w2, b2)
e = Clip(d, lowest, highest)
f = Conv(e, w3)
g = Add(f, c)
h = Concat<axis=1>(g, c)
i = Sigmoid(h)
j = Mul(h, i)
k = GlobalAveragePool(j)
l = Flatten(k)
m = Gemm<transB=1>(l, w4, b4)
y = Softmax(m)
"""
WEIGHTS = {
    "w1": (6, 3, 3, 3),
    "b1": (6,),
    "w2": (6, 1, 3, 3),
    "b2": (6,),
    "w3": (6, 6, 1, 1),
    "w4": (5, 12),
    "b4": (5,),
    "lowest": np.array(0, np.float32),
    "highest": np.array(6, np.float32),
}


@pytest.fixture(scope="session")
def network(small: Any) -> onnx.ModelProto:
    """A small CNN with most of what is quantized in networks."""
    return small.build(NETWORK, WEIGHTS, outputs="float[N,5] y")


class Reader(CalibrationDataReader):
    """Feeds a list of arrays."""

    def __init__(self, name: str, batches: Sequence[np.ndarray]) -> None:
        self.left = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


@pytest.fixture
def by_onnxruntime(tmp_path: Path, small: Any) -> Callable[..., Path]:
    """``by_onnxruntime(model, **settings)``: the file that onnxruntime's own tool makes."""

    def make(model: onnx.ModelProto, batches: Any = None, **settings: Any) -> Path:
        source, target = tmp_path / "float.onnx", tmp_path / "ort.onnx"
        onnx.save(model, source)
        batches = small.batches() if batches is None else batches
        settings.setdefault("quant_format", QuantFormat.QDQ)
        logging.disable(logging.WARNING)  # it advises to pre-process
        try:
            quantize_static(source, target, Reader(model.graph.input[0].name, batches), **settings)
        finally:
            logging.disable(logging.NOTSET)
        return target

    return make


def literal(path: Path | bytes, *inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of a file whose nodes run one by one, as written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


class Imported:
    """What tests do with a quantized file."""

    literal = staticmethod(literal)

    @staticmethod
    def learning(way: str = "lsq") -> qwrap.QConfig:
        """Every scale is trained, those of graph inputs as well."""
        config = qwrap.QConfig(training=way)
        config.set("*", training=way)
        return config

    @staticmethod
    def load(path: Path, **settings: Any) -> qwrap.WrappedModel:
        """The model, after a check that exporting it gives the file again."""
        model = qwrap.load(path, **settings).eval()
        back = path.with_suffix(".back.onnx")
        qwrap.export(model, back)
        assert back.read_bytes() == path.read_bytes()
        return model

    @staticmethod
    def run(model: qwrap.WrappedModel, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs of the model."""
        with torch.no_grad():
            result = model(*map(torch.from_numpy, inputs))
        return [t.numpy() for t in (result if isinstance(result, tuple) else (result,))]

    @staticmethod
    def train(model: qwrap.WrappedModel, *inputs: np.ndarray) -> None:
        """One step of all that can be trained, of a hundredth whatever the gradient."""
        model.train()
        optimizer = torch.optim.Adam(qwrap.param_groups(model), lr=0.01)
        result = model(*map(torch.from_numpy, inputs))
        outputs = result if isinstance(result, tuple) else (result,)
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        optimizer.step()
        model.eval()


@pytest.fixture(scope="session")
def imported() -> type[Imported]:
    return Imported
