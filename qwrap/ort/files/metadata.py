"""What a model says of its own past, and which operators it imports."""

from __future__ import annotations

import onnx

from qwrap.ort.errors import QuantizationError

_PRE_PROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")
_INFERRED = ("onnx.infer", "onnxruntime.quant")


def add_pre_process_metadata(model: onnx.ModelProto) -> None:
    """Tag ``model``, in place, as gone through ``quant_pre_process``."""
    _add(model, *_PRE_PROCESSED)


def model_has_pre_process_metadata(model: onnx.ModelProto) -> bool:
    """Whether ``model`` went through ``quant_pre_process``."""
    return _PRE_PROCESSED in _entries(model)


def add_infer_metadata(model: onnx.ModelProto) -> None:
    """Tag ``model``, in place, as having had its shapes inferred."""
    _add(model, *_INFERRED)


def model_has_infer_metadata(model: onnx.ModelProto) -> bool:
    """Whether the shapes of ``model`` have been inferred."""
    return _INFERRED in _entries(model)


def get_opset_version(model: onnx.ModelProto) -> int:
    """Return the version of ai.onnx that ``model`` imports.

    Raises:
        QuantizationError: it imports none or several (a ``ValueError``).
    """
    versions = [e.version for e in model.opset_import if e.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise QuantizationError(
            f"Failed to find proper ai.onnx domain: the model imports it {len(versions)} times"
        )
    return int(versions[0])


def _entries(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(entry.key, entry.value) for entry in model.metadata_props]


def _add(model: onnx.ModelProto, key: str, value: str) -> None:
    if key not in {entry.key for entry in model.metadata_props}:
        model.metadata_props.add(key=key, value=value)
