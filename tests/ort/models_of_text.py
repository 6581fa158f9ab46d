"""Small models written in ONNX's text form, with seeded weights and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from one_operator import Batch, name_nodes
from onnx import ModelProto, numpy_helper

Weight = tuple[int, ...] | np.ndarray


def parse(
    text: str,
    weights: Mapping[str, Weight],
    inputs: str = "float[2,16] x",
    outputs: str = "float[N,M] y",
    opset: int = 17,
    contrib: bool = False,
    scale: float = 0.3,
) -> ModelProto:
    """A model whose nodes are named after their first outputs.

    Args:
        text: its nodes.
        weights: arrays, or shapes to fill with seeded normal values.
        inputs: as in ONNX's text form.
        outputs: likewise.
        opset: of ai.onnx.
        contrib: whether com.microsoft is imported.
        scale: standard deviation of the values.
    """
    domains = ', "com.microsoft": 1' if contrib else ""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}{domains}]> '
        f"made ({inputs}) => ({outputs}) {{ {text} }}"
    )
    name_nodes(model.graph)
    rng = np.random.default_rng(7)
    for name, value in weights.items():
        array = rng.normal(0, scale, value) if isinstance(value, tuple) else np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def batches(
    shapes: Mapping[str, Sequence[int]] | None = None, count: int = 3, shift: float = 0.0
) -> list[Batch]:
    """Seeded normal values."""
    rng = np.random.default_rng(1)
    shapes = {"x": (2, 16)} if shapes is None else shapes
    return [
        {name: (rng.normal(0, 1, size) + shift).astype(np.float32) for name, size in shapes.items()}
        for _ in range(count)
    ]
