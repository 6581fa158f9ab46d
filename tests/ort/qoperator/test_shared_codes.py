"""The shared models in QOperator form and dynamic: they load, are right, and have the same form."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models_of_text import batches, parse
from one_operator import open_session, sqnr
from onnx import ModelProto, numpy_helper
from quantizer_pairs import form, observe, quality, quantize_incumbent, quantize_own

from qwrap.ort import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    Report,
    quantize_dynamic,
    quantize_static,
)

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[4] / "shared"))
# The image reader of the shared data leaves files to the garbage collector.
pytestmark = [
    pytest.mark.ort(23, 45, 346, 360),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def samples() -> Any:
    if not (SHARED / "data" / "load.py").is_file():
        pytest.skip(f"no shared models in {SHARED}; set QWRAP_SHARED")
    sys.path.insert(0, str(SHARED / "data"))
    return importlib.import_module("load")


class Reader(CalibrationDataReader):
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def feeds_of(samples: Any, name: str) -> list[dict[str, np.ndarray]]:
    return [dict(feed) for feed, _ in samples.val(name, 3)]


def fidelity(wanted: ModelProto, got: ModelProto, feeds: list[dict[str, np.ndarray]]) -> float:
    """SQNR of the outputs, each session optimised as by default."""
    pairs = [
        (open_session(wanted).run(None, feed), open_session(got).run(None, feed)) for feed in feeds
    ]
    flat = [[np.asarray(v) for side in sides for v in side] for sides in zip(*pairs, strict=True)]
    return sqnr(flat[0], flat[1])


# dB that were measured, less 2; per-tensor weights of depthwise convolutions are that bad
STATIC = {
    "squeezenet1_0_imagenet": 17,
    "resnet20_cifar10": 33,
    "mobilenetv2_cifar10_128": 12,
    "super_resolution": 22,
    "mnist_cntk": 33,
}
DYNAMIC = {
    "resnet20_cifar10": 29,
    "super_resolution": 17,
    "mnist_cntk": 40,
    "ppocr_en_number_rec": 22,
    "stories260k": 28,
}


@pytest.mark.parametrize("name", STATIC)
def test_static_models_are_right(samples: Any, name: str) -> None:
    feeds = feeds_of(samples, name)
    path = samples.model_path(name)
    made = quantize_static(
        path, None, Reader(feeds), quant_format=QuantFormat.QOperator, per_channel=True
    )
    assert made is not None
    assert fidelity(onnx.load(path), made, feeds) > STATIC[name]


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_models_are_right(samples: Any, name: str) -> None:
    """The incumbent: super_resolution (opset 10) 2 dB, ppocr an error for its Constant nodes."""
    path = samples.model_path(name)
    made = quantize_dynamic(path, None)
    assert made is not None
    assert fidelity(onnx.load(path), made, feeds_of(samples, name)) > DYNAMIC[name]


@pytest.mark.parametrize("name", ["squeezenet1_0_imagenet", "nanodet_m_320", "stories260k"])
def test_forms_are_those_of_onnxruntimes_tool(samples: Any, name: str, tmp_path: Path) -> None:
    model = onnx.load(samples.model_path(name))
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    ranges = observe(model, feeds_of(samples, name))
    for observed in (ranges, None):
        own = quantize_own(model, observed).model.model
        assert form(own) == form(quantize_incumbent(model, observed, tmp_path))


@pytest.mark.ort(272, "G44", "G68")
@pytest.mark.parametrize("static", [True, False])
def test_bodies_of_a_real_model_are_quantized(samples: Any, static: bool) -> None:
    """The incumbent: ValueError, static TypeError."""
    path, feeds = samples.model_path("silero_vad"), feeds_of(samples, "silero_vad")
    options, report = {"EnableSubgraph": True}, Report()
    if static:
        made = quantize_static(
            path,
            None,
            Reader(feeds),
            quant_format=QuantFormat.QOperator,
            per_channel=True,
            extra_options=options,
            report=report,
        )
    else:
        # two convolutions have very different channels, which ConvInteger does not tell apart
        wide = [
            f"If_0_{branch}_branch__Inline_0__/encoder/{layer}/reparam_conv/Conv"
            for branch in ("then", "else")
            for layer in (2, 3)
        ]
        made = quantize_dynamic(
            path, None, nodes_to_exclude=wide, extra_options=options, report=report
        )
    assert made is not None
    assert sum(node.quantized for node in report.nodes) >= (12 if static else 8)
    assert fidelity(onnx.load(path), made, feeds) > (28 if static else 15)


@pytest.mark.ort("G61")
def test_time_is_linear_in_the_number_of_nodes() -> None:
    """The incumbent looks every tensor up by a scan: 16 times the time for 4 times the nodes."""

    def seconds(layers: int) -> float:
        text = "h0 = Relu(x) " + " ".join(
            f"m{i} = MatMul(h{i}, w{i}) h{i + 1} = Relu(m{i})" for i in range(layers)
        )
        weights = {f"w{i}": (16, 16) for i in range(layers)}
        model = parse(f"{text} y = Tanh(h{layers})", weights)
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            quantize_own(model, None)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(800) < 8 * seconds(200)  # 4 where nothing else disturbs


@pytest.mark.ort(49, "G42", "G44")
@pytest.mark.parametrize("static", [True, False])
def test_float16_bodies(static: bool) -> None:
    text = """
        c = Constant<value = bool {1}>()
        h = MatMul(x, w)
        y = If(c) <
            then_branch = one () => (float16[N,M] p) { p = MatMul(h, v) },
            else_branch = two () => (float16[N,M] q) { q = Add(h, h) }
        >
    """
    shapes = {"w": (16, 16), "v": (16, 16)}
    model = parse(text, shapes, "float16[2,16] x", "float16[N,M] y")
    for tensor in model.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    data = [{"x": batch["x"].astype(np.float16)} for batch in batches()]
    span = (np.array(-5, np.float32), np.array(5, np.float32))
    ranges = dict.fromkeys(("x", "h", "p", "q"), span) if static else None
    options = {"EnableSubgraph": True}
    own = quantize_own(model, ranges, options=options).model.model
    assert quality(model, own, data) > 25


def test_types_of_the_entry_point_are_those_asked_for(samples: Any) -> None:
    path = samples.model_path("mnist_cntk")
    made = quantize_dynamic(path, None, weight_type=QuantType.QUInt8)
    assert made is not None
    codes = [t for t in made.graph.initializer if t.name.endswith("_quantized")]
    assert {tensor.data_type for tensor in codes} == {onnx.TensorProto.UINT8}
