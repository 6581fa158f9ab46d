"""Write a model so that a reader never sees half of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from qwrap.errors import ExportError

PROTO_LIMIT = 2_000_000_000  # bytes; protobuf refuses messages of 2 GiB


def check_target(target: str | os.PathLike[str]) -> None:
    """Refuse a path at which no file can be written, before any work is done for it.

    Raises:
        ExportError: its folder does not exist or is not writable, or it is a folder itself.
    """
    path = Path(target)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: folder {str(path.parent)!r} does not exist; make it first")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; give the name of a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ExportError(f"{path}: folder {str(path.parent)!r} cannot be written to")


def write_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write ``model`` to ``path``, all of it or nothing.

    Args:
        model: what to write; unchanged afterwards.
        path: the file to make or replace. External data goes to ``<name>.data`` beside it.
        external_data: None writes weights outside the file when the model holds external tensors
            or is too big for one protobuf message.
        check: called with the finished file before it takes its place; what it raises leaves
            ``path`` as it was.

    Raises:
        ExportError: the folder does not exist or cannot be written, or ``path`` or its data file
            holds weights that ``model`` still reads.
    """
    target = Path(path)
    check_target(target)
    data_name = f"{target.name}.data"
    _refuse_own_data(model, target.parent / data_name)
    outside = _needs_external(model) if external_data is None else external_data
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / target.name
            ir.save(model, draft, external_data=data_name if outside else None)
            if check is not None:
                check(draft)
            if (draft.parent / data_name).exists():
                os.replace(draft.parent / data_name, target.parent / data_name)
            os.replace(draft, target)
    except OSError as error:
        raise ExportError(f"{target}: cannot be written: {error.strerror or error}") from error


def _external_files(model: ir.Model) -> set[Path]:
    return {
        Path(v.const_value.path).resolve()
        for v in model.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }


def _refuse_own_data(model: ir.Model, data: Path) -> None:
    if data.resolve() in _external_files(model):
        raise ExportError(
            f"{data}: the model was loaded from this file and still reads its weights from it; "
            "export under another name"
        )


def _needs_external(model: ir.Model) -> bool:
    tensors = [
        v.const_value for v in model.graph.initializers.values() if v.const_value is not None
    ]
    if any(isinstance(t, ir.ExternalTensor) for t in tensors):
        return True
    return sum(t.nbytes for t in tensors) > PROTO_LIMIT
