"""Real networks, calibrated on a few of their samples."""

from collections.abc import Callable
from typing import Any

import pytest
from shared_models import SharedModels, default_folder

import qwrap


@pytest.fixture(scope="session")
def shared_model() -> Callable[..., tuple[qwrap.WrappedModel, list[Any]]]:
    """``shared_model(name, samples, **settings)``: calibrated with them, and the samples."""
    if not (default_folder() / "data" / "load.py").is_file():
        pytest.skip(f"no shared models in {default_folder()}; set QWRAP_SHARED")
    models = SharedModels(default_folder())

    def calibrated(
        name: str, samples: int, **settings: Any
    ) -> tuple[qwrap.WrappedModel, list[Any]]:
        batches = models.calibration(name, samples)
        model = qwrap.load(models.path(name)).eval()
        qwrap.prepare(model, qwrap.QConfig(**settings))
        qwrap.calibrate(model, batches, progress=False)
        return model, batches

    return calibrated
