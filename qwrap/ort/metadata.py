"""What a model says of itself: opset version, and marks of the steps that it went through."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto, external_data_helper

from qwrap.ort.errors import QuantizationError

_PRE_PROCESS = "onnx.quant.pre_process"
_INFER = "onnx.infer"
_DONE = "onnxruntime.quant"


def add_pre_process_metadata(model: ModelProto) -> None:
    """Mark ``model``, in place, as one that went through ``quant_pre_process``."""
    _mark(model, _PRE_PROCESS)


def model_has_pre_process_metadata(model: ModelProto) -> bool:
    """Return whether ``model`` went through ``quant_pre_process``."""
    return _is_marked(model, _PRE_PROCESS)


def add_infer_metadata(model: ModelProto) -> None:
    """Mark ``model``, in place, as one whose shapes and types were inferred."""
    _mark(model, _INFER)


def model_has_infer_metadata(model: ModelProto) -> bool:
    """Return whether shapes and types of ``model`` were inferred."""
    return _is_marked(model, _INFER)


def _mark(model: ModelProto, key: str) -> None:
    if all(prop.key != key for prop in model.metadata_props):
        model.metadata_props.add(key=key, value=_DONE)


def _is_marked(model: ModelProto, key: str) -> bool:
    return any(prop.key == key and prop.value == _DONE for prop in model.metadata_props)


def get_opset_version(model: ModelProto) -> int:
    """Return the version of ai.onnx that ``model`` imports.

    Raises:
        QuantizationError: it imports none, or several (a ``ValueError``).
    """
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise QuantizationError(
            f"Failed to find proper ai.onnx domain: the model imports {len(versions)} versions"
        )
    return int(versions[0])


def model_has_external_data(model_path: str | Path) -> bool:
    """Return whether an initializer of the model in a file is kept in another file."""
    model = onnx.load(str(model_path), load_external_data=False)
    return any(map(external_data_helper.uses_external_data, model.graph.initializer))
