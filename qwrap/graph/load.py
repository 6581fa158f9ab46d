"""Read a model without trusting it: nothing outside its folder is opened, no weight is copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qwrap.errors import ModelError

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


def read_model(source: Source) -> ir.Model:
    """Return ``source`` as an onnx_ir model that the caller owns.

    External data stays on disk until a tensor is used.

    Raises:
        ModelError: not an ONNX model, cut off, without opset, or its external data is missing,
            too short or outside the model's folder; also for sparse initialisers, which onnx_ir
            would drop silently.
    """
    if isinstance(source, ir.Model):
        return source.clone()
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, "the ModelProto", None)
    path = Path(source)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected an ONNX model")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(
            f"{path}: not an ONNX model, or cut off ({error}); export or download it again"
        ) from error
    return _from_proto(proto, str(path), path.parent)


def _from_proto(proto: onnx.ModelProto, where: str, folder: Path | None) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{where}: not an ONNX model: it has no graph or imports no opset")
    sparse = [t.values.name for g in _graphs(proto.graph) for t in g.sparse_initializer]
    if sparse:
        raise ModelError(
            f"{where}: sparse initialisers {sparse} are not supported; make them dense first"
        )
    _check_external_data(proto, where, folder)
    _check_names(proto.graph, where)
    try:
        model = ir.from_proto(proto)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: malformed graph: {error}") from error
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in _graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _check_external_data(proto: onnx.ModelProto, where: str, folder: Path | None) -> None:
    problems = []
    for tensor in _tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            problem = _external_problem(tensor, folder)
            if problem:
                problems.append(f"tensor {tensor.name!r}: {problem}")
    if problems:
        raise ModelError(f"{where}: external data cannot be used: " + "; ".join(problems))


def _external_problem(tensor: onnx.TensorProto, folder: Path | None) -> str | None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        return f"{location!r} has no folder; pass the model's path instead of a ModelProto"
    root = folder.resolve()
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(root):
        return f"location {location!r} leaves the model's folder"
    if not file.is_file():
        return f"file {location!r} is missing; put it beside the model"
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError:
        return f"offset or length of {location!r} is not a number"
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        return f"file {location!r} is too short for offset {offset} and length {length}"
    return None


def _check_names(graph: onnx.GraphProto, where: str, outer: frozenset[str] = frozenset()) -> None:
    """Refuse values that are made twice, or used before (or without) being made."""
    known = set(outer) | {v.name for v in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        label = f"{where}: node {node.name or node.op_type!r}"
        missing = [name for name in node.input if name and name not in known]
        if missing:
            raise ModelError(f"{label} reads {missing}, which nothing before it produces")
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    _check_names(inner, where, frozenset(known))
        twice = [name for name in node.output if name and name in known]
        if twice:
            raise ModelError(f"{label} produces {twice}, which already exists")
        known.update(node.output)
    missing = [v.name for v in graph.output if v.name not in known]
    if missing:
        raise ModelError(f"{where}: graph outputs {missing} are produced by no node")
