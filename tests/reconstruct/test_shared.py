"""The papers' claim in miniature, on a real network."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qwrap
from qwrap.algorithms.adaround import adaround
from qwrap.algorithms.brecq import brecq
from qwrap.quant.outcome import Outcome

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))


# The image reader of the shared data leaves files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("algorithm", [adaround, brecq])
def test_learned_rounding_beats_nearest_at_four_bits(algorithm: Callable[..., Outcome]) -> None:
    if not (SHARED / "data" / "load.py").exists():
        pytest.skip("needs the folder of shared models and data beside the checkout")
    sys.path.insert(0, str(SHARED / "data"))
    shared = importlib.import_module("load")
    name = "resnet20_cifar10"
    batches = [inputs for inputs, _ in shared.calib(name, 32)]
    model = qwrap.load(shared.model_path(name)).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    qwrap.calibrate(model, batches, progress=False)
    outcome = algorithm(model, batches, iterations=30, batch_size=8, lr=0.2, progress=False)
    assert outcome
    assert outcome.after < 0.5 * outcome.before
