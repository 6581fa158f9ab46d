"""Both tools side by side."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from calibration_cases import Reader, conv_model
from onnxruntime.quantization import calibrate as incumbent

from qwrap.ort import calibrate as ours


@pytest.fixture
def conv_path(tmp_path: Path) -> Path:
    path = tmp_path / "conv.onnx"
    onnx.save(conv_model(), path)
    return path


Collect = Callable[..., Any]


@pytest.fixture
def collected(tmp_path: Path) -> Collect:
    """Return ranges of a file from one of the tools, after one collect_data for each list."""

    def collect(
        module: ModuleType,
        path: Path,
        method: str,
        calls: Sequence[Sequence[Any]],
        op_types: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            calibrator = module.create_calibrator(
                path,
                op_types,
                str(tmp_path / "augmented.onnx"),
                module.CalibrationMethod[method],
                extra_options=options,
            )
            for batches in calls:
                calibrator.collect_data(Reader(batches))
            return calibrator.compute_data()

    return collect


@pytest.fixture
def both(collected: Collect) -> Callable[..., tuple[Any, Any]]:
    """Return our ranges and onnxruntime's."""

    def compare(*args: Any, **options: Any) -> tuple[Any, Any]:
        return collected(ours, *args, **options), collected(incumbent, *args, **options)

    return compare
