"""Read a model without trusting it: nothing outside its folder is opened, no weight is copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qwrap.errors import ModelError
from qwrap.graph.check import check_proto, external_problem
from qwrap.graph.external import DataFile, FileTensor

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


def read_model(source: Source) -> ir.Model:
    """Return ``source`` as an onnx_ir model that the caller owns.

    External data stays on disk until a tensor is used.

    Raises:
        ModelError: not an ONNX model, cut off, of an opset that the installed onnx does not know,
            with nodes that break their schema or the order of the graph, or its external data is
            missing, too short or outside the model's folder; also for sparse initialisers, which
            onnx_ir would drop silently.
    """
    if isinstance(source, ir.Model):
        return _from_ir(source)
    if isinstance(source, onnx.ModelProto):
        own = onnx.ModelProto()
        own.CopyFrom(source)  # the caller may go on changing it
        return _from_proto(own, "the ModelProto", None)
    path = Path(source)
    return _from_proto(_parse(path), str(path), path.parent)


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected an ONNX model")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(
            f"{path}: not an ONNX model, or cut off ({error}); export or download it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    return proto


def _from_proto(proto: onnx.ModelProto, where: str, folder: Path | None) -> ir.Model:
    try:
        check_proto(proto, where, folder)
        return to_model(proto, folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # text that is not UTF-8 too
        raise ModelError(f"{where}: malformed graph: {error}") from error


def to_model(proto: onnx.ModelProto, folder: Path | None, *, is_original: bool = True) -> ir.Model:
    """Return a checked proto as a model that keeps it, so that it can be written again as it was.

    Args:
        proto: the model; from here on owned by the result.
        folder: where its external data lies. None: it has none.
        is_original: whether ``original_proto`` is to return it.

    Raises:
        ModelError: external data is missing.
    """
    model = ir.from_proto(proto)
    if is_original:
        model.meta[ORIGINAL] = proto
    if folder is not None:
        _open_files(model, folder)
    return model


ORIGINAL = "qwrap.original"


def original_proto(model: ir.Model) -> onnx.ModelProto | None:
    """Return what ``model`` was read from, None if it was made or changed since; not to be changed.

    A clone of a model, which is what changes are made to, has no original.
    """
    proto = model.meta.get(ORIGINAL)
    assert proto is None or isinstance(proto, onnx.ModelProto)
    return proto


def _from_ir(source: ir.Model) -> ir.Model:
    """Copy a model; its tensors are shared, for they are never written to."""
    where = "the onnx_ir model"
    model = source.clone()
    for tensor in external_tensors(model):
        problem = external_problem(
            os.fspath(tensor.location),
            tensor.offset or 0,
            tensor.length or 0,
            tensor.nbytes,
            Path(tensor.base_dir),
        )
        if problem:
            raise ModelError(f"{where}: tensor {tensor.name!r}: {problem}")
    try:
        check_proto(without_weights(model), where, None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: malformed graph: {error}") from error
    _open_files(model, None)
    return model


# --- external data -------------------------------------------------------------------------------


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors that lie in files, also in subgraphs, attributes and functions."""
    for graph in _graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                yield from _in_files(attribute)


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    for outer in (model.graph, *(function.graph for function in model.functions.values())):
        yield outer
        yield from outer.subgraphs()


def _in_files(attribute: ir.Attr) -> list[ir.ExternalTensor]:
    if attribute.is_ref() or attribute.type not in (
        ir.AttributeType.TENSOR,
        ir.AttributeType.TENSORS,
    ):
        return []
    one = attribute.type == ir.AttributeType.TENSOR
    tensors = [attribute.as_tensor()] if one else attribute.as_tensors()
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]


def _open_files(model: ir.Model, folder: Path | None) -> None:
    """Let the external tensors of ``model`` read files that are open from now on, in place.

    Args:
        model: checked by ``external_problem``.
        folder: where the files lie; None: where the tensors themselves say.
    """
    files: dict[Path, DataFile] = {}

    def opened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        if folder is not None:
            tensor.base_dir = folder
        path = Path(tensor.path)
        if path not in files:
            try:
                files[path] = DataFile(path)
            except OSError as error:
                raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        return FileTensor(tensor, files[path])

    for graph in _graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = opened(value.const_value)
        for node in graph:
            for name, held in [(n, a) for n, a in node.attributes.items() if _in_files(a)]:
                if held.type == ir.AttributeType.TENSOR:
                    tensor = opened(held.as_tensor())
                    node.attributes[name] = ir.AttrTensor(name, tensor, held.doc_string)
                else:
                    tensors = [opened(t) for t in held.as_tensors()]
                    node.attributes[name] = ir.AttrTensors(name, tensors, held.doc_string)


SMALL = 4096  # bytes: initialisers beyond this steer no shapes, so inference need not see them


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """Return a proto of ``model`` in which every large initialiser is a stub without data."""
    skeleton = model.clone()
    for graph in (skeleton.graph, *skeleton.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= SMALL:
                value.const_value = ir.tensor(tensor.numpy(), name=value.name)
            elif tensor is not None and tensor.nbytes > SMALL:
                value.const_value = ir.ExternalTensor(
                    "-",
                    0,
                    0,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                )
    return ir.to_proto(skeleton)
