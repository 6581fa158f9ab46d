"""A model, back in an ONNX file: quantized if it was prepared, else as it was read."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.export.half import write_half
from qwrap.export.qdq import QdqWriter
from qwrap.export.runtime import Written, check_session
from qwrap.export.write_back import origin_of, written_back
from qwrap.graph.index import opset_of
from qwrap.graph.load import external_tensors
from qwrap.graph.original import with_values
from qwrap.graph.save import filled, write_message, write_model
from qwrap.model.materialize import changed_tensors, materialize
from qwrap.model.shards import check_unsharded
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import plan_of, stubs


def export(
    model: WrappedModel, path: str | os.PathLike[str], *, external_data: bool | None = None
) -> None:
    """Write a model as an ONNX file.

    A prepared model becomes a QDQ file that onnxruntime runs in integer kernels. Names, metadata
    and everything that is not quantized stay as ``prepare`` left them. An onnxruntime session is
    opened on the result before it takes its place, so that a file which exists can be run. Where
    it is onnxruntime that cannot run a format, or the float model, a ``QwrapWarning`` says so and
    the file is written all the same.

    A model that was not prepared becomes the file it was read from with its current parameters:
    all else is equal, node for node, and a tensor that did not change is equal byte for byte. It
    may take the place of the file it was read from, and of its external data. The same holds for
    one that was loaded from a quantized file, unless it was prepared anew: what training changed
    goes where the file has its scales, zero points, codes and floats.

    Args:
        model: trained or not; if it was prepared, calibrated too.
        path: file to make or replace.
        external_data: keep weights in ``<name>.data``; None does so if the source did.

    Raises:
        NotCalibratedError: a tensor has no scale yet.
        ModelError: the parameters are sharded.
        ExportError: the file cannot be written, onnxruntime refuses it, or a quantized file would
            replace the float one or the weights that the model still reads.
    """
    origin = origin_of(model)
    if origin is not None:
        write_message(*written_back(model, origin), path, external_data=external_data)
    elif model.plan is None:
        write_message(
            *with_values(model.graph, changed_tensors(model)), path, external_data=external_data
        )
    else:
        _export_quantized(model, path, external_data)


def _export_quantized(
    model: WrappedModel, path: str | os.PathLike[str], external_data: bool | None
) -> None:
    source = model.graph.source
    if source is not None and same_file(source, path):
        raise ExportError(f"{path}: is the float model itself; write to another file")
    draft, written = _quantized(model)
    sources = [Path(tensor.path) for tensor in external_tensors(model.graph.model)]
    data = Path(f"{os.fspath(path)}.data")
    if data.exists() and any(data.samefile(source) for source in sources):
        raise ExportError(
            f"{path}: the model still reads its weights from {data.name!r}, which the export would "
            "replace; write to a file of another name"
        )
    if external_data is None and sources:
        external_data = True

    def check(file: Path) -> None:
        folder = Path() if source is None else Path(source).parent
        check_session(file, written, opset_of(draft, ""), lambda: materialize(model), folder)

    write_model(draft, path, external_data=external_data, check=check)


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether two paths name one file that exists."""
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def to_quantized_graph(model: WrappedModel) -> ir.Model:
    """Return a copy of the model's graph with its QDQ pairs, codes and current parameters."""
    origin = origin_of(model)
    if origin is not None:
        return ir.from_proto(filled(*written_back(model, origin)))
    return _quantized(model)[0]


def _quantized(model: WrappedModel) -> tuple[ir.Model, list[Written]]:
    plan_of(model)
    check_unsharded(model)
    for _, stub in stubs(model):
        stub.qparams  # noqa: B018 -- raises where a scale is missing, before any work is done
    draft = materialize(model)
    writer = QdqWriter(model, draft)
    writer.write()
    write_half(writer.graph, plan_of(model).half, writer.make)
    return draft, list(writer.make.written)
