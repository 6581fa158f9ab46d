"""Real models in 4 bits against their float selves, on data that no method saw."""

from __future__ import annotations

import importlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import qwrap

pytestmark = pytest.mark.ort(296, 297, "G4")

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
Array = np.ndarray[Any, Any]
Samples = list[dict[str, Array]]


@pytest.fixture(scope="module")
def stories() -> tuple[Path, Samples, Samples]:
    """A language model, samples to learn from, and others to judge by."""
    if not (SHARED / "data" / "load.py").is_file():
        pytest.skip(f"no shared models in {SHARED}; set QWRAP_SHARED")
    sys.path.insert(0, str(SHARED / "data"))
    load = importlib.import_module("load")
    learned, judged = ([x for x, _ in of("stories260k", n)] for of, n in
                       ((load.calib, 8), (load.val, 3)))  # fmt: skip
    return Path(load.model_path("stories260k")), learned, judged


def outputs(model: onnx.ModelProto, samples: Samples) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [session.run(None, x)[0].astype(np.float64) for x in samples]


@pytest.mark.parametrize(("size", "symmetric"), [(32, False), (128, True)])
def test_gptq_beats_nearest_rounding_and_hqq_on_unseen_stories(
    stories: tuple[Path, Samples, Samples], size: int, symmetric: bool
) -> None:
    path, learned, judged = stories
    exact = outputs(onnx.load(path), judged)

    def quality(method: str) -> float:
        data = learned if method in ("gptq", "awq") else None
        model = qwrap.quantize_weights(
            path, block_size=size, symmetric=symmetric, method=method, batches=data
        )
        assert model is not None
        pairs = list(zip(outputs(model, judged), exact, strict=True))
        noise = sum(float(np.square(a - b).sum()) for a, b in pairs)
        return 10 * math.log10(sum(float(np.square(b).sum()) for _, b in pairs) / noise)

    nearest, without_data = quality("rtn"), quality("hqq")
    assert quality("gptq") > max(nearest + 1, without_data + 0.3)  # dB
    assert quality("awq") > nearest + 0.3
