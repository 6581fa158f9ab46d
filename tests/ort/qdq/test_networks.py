"""QDQ form of whole networks: the graphs of onnxruntime's tool, bit for bit, and runnable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from one_operator import run, sqnr
from onnx import ModelProto
from side_by_side import Ranges, by_incumbent, by_qwrap, differences, observed

from qwrap.ort.files.model_io import read_model

pytestmark = pytest.mark.ort(*range(168, 178), 182, 185, 186, 199, "G61")
SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[4] / "shared"))
NAMES = [
    "mobilenetv2_cifar10_128",
    "ppocr_en_number_rec",
    "resnet20_cifar10",
    "squeezenet1_0_imagenet",
    "stories260k",
    "super_resolution",
]
Network = tuple[ModelProto, list[Mapping[str, np.ndarray]], Ranges]


@cache
def network(name: str) -> Network:
    """A network whose constants are initializers, random data, and its ranges on that."""
    path = SHARED / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not there (QWRAP_SHARED says where to look)")
    model = read_model(onnx.load(path))
    batches = [draw(path, seed) for seed in (0, 1)]
    return model, batches, observed(model, batches, None)


def draw(path: Path, seed: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    sizes = {
        i.name: [d if isinstance(d, int) else 1 if k == 0 else 16 for k, d in enumerate(i.shape)]
        for i in inputs
    }
    return {
        i.name: rng.integers(0, 50, sizes[i.name])
        if "int64" in i.type
        else rng.normal(0, 1, sizes[i.name]).astype(np.float32)
        for i in inputs
    }


def is_known(text: str) -> bool:
    """Whether a difference is that of a Relu whose output was 0 for all data.

    With int8 codes its zero point is in the middle, and negatives would pass without it.
    """
    return "relu_2.tmp_0" in text or "conv2d_55.tmp_0" in text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "QInt8", "options": {"ForceQuantizeNoInputCheck": True}},
        {"activation": "QUInt16", "options": {"ActivationSymmetric": True}},
    ],
    ids=["uint8", "int8 forced", "16 bits symmetric"],
)
@pytest.mark.parametrize("name", NAMES)
def test_graphs_are_equal(name: str, settings: dict[str, Any]) -> None:
    model, _, ranges = network(name)
    expected = by_incumbent(model, ranges, **settings)
    found = differences(expected, by_qwrap(model, ranges, **settings))
    assert [text for text in found if not is_known(text)] == []


@pytest.mark.parametrize("name", NAMES)
def test_channels_run_in_onnxruntime(name: str) -> None:
    model, batches, ranges = network(name)
    quantized = by_qwrap(model, ranges, per_channel=True, activation="QInt8")
    outputs = [run(quantized, batches[0], optimised)[:1] for optimised in (False, True)]
    for output in outputs:  # on noise; what calibration says of it is not the point here
        assert sqnr(run(model, batches[0])[:1], output) > 15
