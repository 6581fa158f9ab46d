"""Small models to calibrate, readers of batches, and how ranges are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

CONV = """
  c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
  r = Relu (c)
  g = GlobalAveragePool (r)
  f = Flatten (g)
  y = MatMul (f, m)
"""


class Reader:
    """Batches one by one; inherits from nothing."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        """Return the next batch, None at the end."""
        return next(self._batches, None)


def text_model(
    nodes: str,
    weights: Mapping[str, np.ndarray] | None = None,
    inputs: str = "float[N,3,H,W] x",
    outputs: str = "float[N,2] y",
    opset: int = 17,
) -> onnx.ModelProto:
    header = f'<ir_version: 8, opset_import: ["": {opset}]>'
    model = onnx.parser.parse_model(f"{header} small ({inputs}) => ({outputs}) {{{nodes}}}")
    for name, array in (weights or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def conv_model(dtype: str = "float") -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    kind = np.float16 if dtype == "float16" else np.float32
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "m": (4, 2)}
    weights = {name: rng.normal(0, 0.4, shape).astype(kind) for name, shape in shapes.items()}
    return text_model(CONV, weights, f"{dtype}[N,3,H,W] x", f"{dtype}[N,2] y")


def images(count: int = 4, size: int = 8, seed: int = 0, scale: float = 1.0) -> list[Any]:
    rng = np.random.default_rng(seed)
    grow = [1 + 0.5 * i for i in range(count)]
    return [{"x": rng.normal(0, scale * g, (2, 3, size, size)).astype(np.float32)} for g in grow]


def assert_close(ours: Any, theirs: Any, attributes: Sequence[str] = ("lowest", "highest")) -> None:
    """Compare ranges; torch and onnxruntime sum in other orders, so 1e-5 of a range is rounding."""
    assert set(ours.keys()) == set(theirs.keys())
    for name in theirs:
        span = float(np.max(np.abs([theirs[name].lowest, theirs[name].highest])))
        for attribute in attributes:
            a, b = getattr(ours[name], attribute), getattr(theirs[name], attribute)
            assert np.shape(a) == np.shape(b), (name, attribute)
            assert a.dtype == b.dtype, (name, attribute)
            where = f"{name} {attribute}"
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * span, err_msg=where)
