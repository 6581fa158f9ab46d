"""Ranges in a JSON file, so that data need not run again."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qwrap.graph import replace_file
from qwrap.ort.calibration.fingerprint import Model, fingerprint
from qwrap.ort.calibration.tensor_data import TensorData, TensorsData
from qwrap.ort.enums import CalibrationMethod
from qwrap.ort.errors import QuantizationError

_LOG = logging.getLogger(__name__)

FilePath = str | os.PathLike[str]


class CalibrationCacheEncoder(json.JSONEncoder):
    """Writes ranges, methods and numpy's arrays and numbers as JSON."""

    def default(self, obj: Any) -> Any:
        """Return what JSON knows for ``obj``."""
        if isinstance(obj, TensorData | TensorsData):
            return obj.to_dict()
        if isinstance(obj, np.ndarray | np.float16):  # of a float16 number the type would be lost
            return {"data": obj.tolist(), "dtype": str(obj.dtype), "CLS": "numpy.array"}
        if isinstance(obj, CalibrationMethod):
            return {"CLS": type(obj).__name__, "value": str(obj)}
        if isinstance(obj, np.integer):
            return int(obj)
        if isinstance(obj, np.floating):
            return float(obj)
        return super().default(obj)


def save_tensors_data(
    tensors_data: TensorsData,
    path: FilePath,
    *,
    smooth_quant: bool = False,
    model: Model | None = None,
) -> None:
    """Write ranges to a JSON file, all of it or nothing; its folder is made if need be.

    Args:
        tensors_data: what calibration returned.
        path: the file to make or replace.
        smooth_quant: whether the ranges are those of a model that SmoothQuant changed.
        model: the model they belong to; its fingerprint goes into the file under ``model``, which
            onnxruntime's reader ignores.
    """
    payload = {**tensors_data.to_dict(), "smooth_quant": smooth_quant}
    if model is not None:
        payload["model"] = fingerprint(model)
    text = json.dumps(payload, cls=CalibrationCacheEncoder)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, partial(_write, text))


def load_tensors_data(path: FilePath, *, model: Model | None = None) -> TensorsData:
    """Read ranges from a file of ``save_tensors_data``, or of onnxruntime's.

    Args:
        path: the file.
        model: what the ranges are for. A file that names another model is refused, one that names
            none is accepted.

    Raises:
        FileNotFoundError: there is no such file.
        QuantizationError: it is no file, is not such a file, or was made for another model (a
            ``ValueError``).
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"Calibration cache not found: {found}")
    if not found.is_file():
        raise QuantizationError(f"Calibration cache path is not a file: {found}")
    return _ranges(found, _read(found), model)


def cached_ranges(
    path: FilePath,
    method: CalibrationMethod,
    *,
    smooth_quant: bool = False,
    model: Model | None = None,
) -> TensorsData | None:
    """Return the ranges in a cache if they can be used, None if data has to run.

    Args:
        path: where the cache is, or will be.
        method: how ranges are to be chosen.
        smooth_quant: whether SmoothQuant changes the model. Ranges of the other setting are not
            used; a warning says so.
        model: what the ranges are for, as for ``load_tensors_data``.

    Raises:
        QuantizationError: the path is no file, or its ranges were chosen by another method, or in
            another model (a ``ValueError``).
    """
    found = Path(path)
    if not found.exists():
        return None
    if not found.is_file():
        raise QuantizationError(f"calibration_cache_path is not a file: {found}")
    payload = _read(found)
    smooth = bool(payload.get("smooth_quant", False))
    if smooth != smooth_quant:
        _LOG.warning(
            "Calibration cache at %s was produced with smooth_quant=%s; current run uses "
            "smooth_quant=%s. Recomputing ranges and overwriting cache.",
            found,
            smooth,
            smooth_quant,
        )
        return None
    ranges = _ranges(found, payload, model)
    if ranges.calibration_method != method:
        raise QuantizationError(
            f"Calibration cache at {found} was produced with {ranges.calibration_method}, but "
            f"calibrate_method={method} is asked for. Delete the cache or pass a matching "
            "calibrate_method."
        )
    return ranges


def _write(text: str, draft: Path) -> None:
    draft.write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuantizationError(
            f"Calibration cache at {path} is no JSON ({error}). Delete it to calibrate again."
        ) from error
    if not isinstance(payload, dict) or not {"data", "calibration_method"} <= payload.keys():
        raise QuantizationError(
            f"Calibration cache at {path} lacks 'data' or 'calibration_method'. Delete it to "
            "calibrate again."
        )
    return payload


def _ranges(path: Path, payload: dict[str, Any], model: Model | None) -> TensorsData:
    made_for = payload.get("model")
    if model is not None and made_for is not None:
        ours = fingerprint(model)
        if ours != made_for:
            raise QuantizationError(
                f"Calibration cache at {path} was made for another model ({_other(ours, made_for)})"
                ". Delete the cache, or name another calibration_cache_path."
            )
    try:
        return TensorsData.from_dict(payload)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QuantizationError(
            f"Calibration cache at {path} is damaged ({error}). Delete it to calibrate again."
        ) from error


def _other(ours: dict[str, Any], theirs: Any) -> str:
    if not isinstance(theirs, dict) or ours["inputs"] != theirs.get("inputs"):
        return "its inputs differ"
    return "its inputs are the same, its nodes or weights differ"
