"""Two-layer float models, QDQ files of them written by hand, and the taps that simulate them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qwrap.model import Program, ValuePoint, WrappedModel, load

FLOAT = TensorProto.FLOAT
SCALES = {"x": (0.03, 128), "h": (0.051, 0), "y": (0.27, 117)}  # u8; the batches clip a little
WEIGHT_SCALE = np.float32(0.0125)


class Tap(torch.nn.Module):
    """Fake quantization to u8, written out."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.scale, self.zero_point = torch.tensor(scale), zero_point

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.clamp(torch.round(x / self.scale) + self.zero_point, 0, 255)
        return (codes - self.zero_point) * self.scale


@dataclass
class Pair:
    """A wrapped float model with its taps, and the QDQ file."""

    model: WrappedModel
    float_path: Path
    path: Path
    batches: list[np.ndarray] = field(default_factory=list)


def constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"w1": (12, 16), "w2": (16, 5)}
    return {name: rng.integers(-127, 128, shape).astype(np.int8) for name, shape in shapes.items()}


def float_model() -> onnx.ModelProto:
    """``y = relu(x @ w1) @ w2``, ``x`` of shape [N, 12]."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["h"], "relu"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], "second"),
    ]
    stored = [
        constant(name, codes.astype(np.float32) * WEIGHT_SCALE) for name, codes in weights().items()
    ]
    return make_model(nodes, stored)


def make_model(
    nodes: list[onnx.NodeProto], stored: list[onnx.TensorProto], width: int = 5, opset: int = 13
) -> onnx.ModelProto:
    """A model from ``x`` of shape [N, 12] to ``y`` of shape [N, width]."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 12])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", width])],
        stored,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def quantize_pair(
    source: str, name: str, target: str, scale: float, zero_point: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Q and DQ from ``source`` to ``target``; ``name`` prefixes what is new."""
    qparams = [f"{name}_scale", f"{name}_zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", [source, *qparams], [f"{name}_codes"], f"{name}_Q"),
        helper.make_node("DequantizeLinear", [f"{name}_codes", *qparams], [target], f"{name}_DQ"),
    ]
    stored = [
        constant(qparams[0], np.float32(scale)),
        constant(qparams[1], np.uint8(zero_point)),
    ]
    return nodes, stored


def qdq_model(scales: Mapping[str, tuple[float, int]]) -> onnx.ModelProto:
    """The QDQ form of ``float_model``; the internal name of the output is ``y_float``."""
    nodes, stored = quantize_pair("x", "x", "x_dq", *scales["x"])
    for name, codes in weights().items():
        stored += [
            constant(f"{name}_q", codes),
            constant(f"{name}_s", WEIGHT_SCALE),
            constant(f"{name}_z", np.int8(0)),
        ]
        inputs = [f"{name}_q", f"{name}_s", f"{name}_z"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"]))
    nodes.append(helper.make_node("MatMul", ["x_dq", "w1_dq"], ["a"], "first"))
    nodes.append(helper.make_node("Relu", ["a"], ["h"], "relu"))
    more, tensors = quantize_pair("h", "h", "h_dq", *scales["h"])
    nodes += more
    stored += tensors
    nodes.append(helper.make_node("MatMul", ["h_dq", "w2_dq"], ["y_float"], "second"))
    more, tensors = quantize_pair("y_float", "y", "y", *scales["y"])
    return make_model(nodes + more, stored + tensors)


def exact_program(model: WrappedModel) -> Program:
    """QLinearMatMul's arithmetic (``onnxruntime/core/mlas``), in integers and one float32 product.

    The kernels return what the taps behind them leave alone; Relu is the clamp at zero point 0.
    """
    taps = {point: model.tap(point) for point in model.attached}
    return Program(
        taps=taps,
        kernels={"first": qlinear_matmul("x", "h", "w1"), "second": qlinear_matmul("h", "y", "w2")},
    )


def qlinear_matmul(source: str, target: str, weight: str):
    x_scale, (y_scale, y_zero) = SCALES[source][0], SCALES[target]
    codes = torch.from_numpy(weights()[weight]).long()
    multiplier = torch.tensor(x_scale) * torch.tensor(WEIGHT_SCALE) / torch.tensor(y_scale)

    def kernel(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        steps = torch.round(x / torch.tensor(x_scale)).long()  # code - zero point
        result = torch.round((steps @ codes).float() * multiplier) + y_zero
        return (result.clamp(0, 255) - y_zero) * torch.tensor(y_scale)

    return kernel


def save_pair(
    folder: Path,
    scales: Mapping[str, tuple[float, int]] | None = None,
    *,
    exact: bool = True,
    count: int = 3,
) -> Pair:
    """Taps at ``SCALES``; a file at ``scales``, by default the same."""
    float_path, path = folder / "small.onnx", folder / "small.qdq.onnx"
    onnx.save(float_model(), float_path)
    onnx.save(qdq_model({**SCALES, **(scales or {})}), path)
    model = load(float_path)
    model.attach({ValuePoint(name): Tap(*values) for name, values in SCALES.items()})
    if exact:
        model.programs["exact"] = lambda: exact_program(model)
    rng = np.random.default_rng(3)
    batches = [rng.normal(0, 1.5, (9 + i, 12)).astype(np.float32) for i in range(count)]
    return Pair(model, float_path, path, batches)


@dataclass
class Builder:
    """What tests write models with."""

    model = staticmethod(make_model)
    pair = staticmethod(quantize_pair)
    constant = staticmethod(constant)


@pytest.fixture
def build() -> Builder:
    return Builder()


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    """``make_pair(scales=None, exact=True, count=3)``."""
    return partial(save_pair, tmp_path)
