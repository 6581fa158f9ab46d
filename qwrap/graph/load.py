"""Read a model without trusting it: nothing outside its folder is opened, no weight is copied."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message

from qwrap.errors import ModelError
from qwrap.graph.check import Also, check_proto, external_problem, packed_size
from qwrap.graph.external import DataFile, FileTensor
from qwrap.graph.nodes import graphs
from qwrap.graph.sparse import densified
from qwrap.graph.tie import untie

Source = str | os.PathLike[str] | onnx.ModelProto | ir.Model


def read_model(source: Source, also: Also | None = None, *, untied: bool = False) -> ir.Model:
    """Return ``source`` as an onnx_ir model that the caller owns.

    External data stays on disk until a tensor is used. Sparse tensors become dense ones.

    Args:
        source: a path, a message or a model of onnx_ir.
        also: finds what else is wrong with a model that is refused, for the same error.
        untied: give each node its own copy of the float initialisers that it shares.

    Raises:
        ModelError: not an ONNX model, cut off, of an opset that the installed onnx does not know,
            with nodes that break their schema or the order of the graph, or its external data is
            missing, too short or outside the model's folder. The error lists all problems.
    """
    if isinstance(source, ir.Model):
        model = _from_ir(source, also)
        if not untied:
            return model
        folder = next((Path(tensor.base_dir) for tensor in external_tensors(model)), None)
        return _from_proto(ir.to_proto(model), "the onnx_ir model", folder, also, untied)
    if isinstance(source, onnx.ModelProto):
        own = onnx.ModelProto()
        own.CopyFrom(source)  # the caller may go on changing it
        return _from_proto(own, "the ModelProto", None, also, untied)
    path = Path(source)
    return _from_proto(_parse(path), str(path), path.parent, also, untied)


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


def _from_proto(
    proto: onnx.ModelProto, where: str, folder: Path | None, also: Also | None, untied: bool
) -> ir.Model:
    try:
        check_proto(proto, where, folder, also)
        if untied:
            untie(proto)
        return to_model(proto, folder)
    except MALFORMED as error:
        raise ModelError(f"{where}: malformed graph: {error.__cause__ or error}") from error


# What onnx_ir raises over a message that breaks the format itself, text that is not UTF-8 too.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, ir.serde.SerdeError)


def to_model(proto: onnx.ModelProto, folder: Path | None, *, is_original: bool = True) -> ir.Model:
    """Return a checked proto as a model that keeps it, so that it can be written again as it was.

    Args:
        proto: the model; from here on owned by the result.
        folder: where its external data lies. None: it has none.
        is_original: whether ``original_proto`` is to return it.

    Raises:
        ModelError: external data is missing.
    """
    model = ir.from_proto(densified(proto))
    if is_original:
        model.meta[ORIGINAL] = proto
    if folder is not None:
        _open_files(model, folder)
    return model


def borrowed_model(proto: onnx.ModelProto, folder: Path | None = None) -> ir.Model:
    """Return a message as a model that shares its tensors instead of copying them.

    Args:
        proto: must not change as long as the result is used.
        folder: where its external data lies, which must have been checked. None: it has none.

    Raises:
        ModelError: the message is malformed, or a file with data cannot be read.
    """
    try:
        return to_model(proto, folder, is_original=False)
    except MALFORMED as error:
        raise ModelError(f"the ModelProto: malformed graph: {error.__cause__ or error}") from error


ORIGINAL = "qwrap.original"


def original_proto(model: ir.Model) -> onnx.ModelProto | None:
    """Return what ``model`` was read from, None if it was made or changed since; not to be changed.

    A clone of a model, which is what changes are made to, has no original.
    """
    proto = model.meta.get(ORIGINAL)
    assert proto is None or isinstance(proto, onnx.ModelProto)
    return proto


def _from_ir(source: ir.Model, also: Also | None) -> ir.Model:
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
        check_proto(without_weights(model), where, None, also)
    except MALFORMED as error:
        raise ModelError(f"{where}: malformed graph: {error.__cause__ or error}") from error
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
    original = original_proto(model)
    return _skeleton(model) if original is None else _skeleton_of(densified(original), model)


def _skeleton_of(proto: onnx.ModelProto, model: ir.Model) -> onnx.ModelProto:
    """Copy all of the message that ``model`` was read from but its large initialisers."""
    skeleton = onnx.ModelProto()
    _copy_fields(proto, skeleton, but="graph")
    _copy_fields(proto.graph, skeleton.graph, but="initializer")
    for tensor in proto.graph.initializer:
        if packed_size(tensor) > SMALL:
            skeleton.graph.initializer.append(_stub(tensor))
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            data = model.graph.initializers[tensor.name].const_value
            assert data is not None
            small = skeleton.graph.initializer.add(name=tensor.name, dims=tensor.dims)
            small.data_type, small.raw_data = tensor.data_type, data.tobytes()
        else:
            skeleton.graph.initializer.append(tensor)
    for graph in itertools.islice(graphs(skeleton.graph), 1, None):
        for tensor in graph.initializer:
            if packed_size(tensor) > SMALL:
                tensor.CopyFrom(_stub(tensor))
    return skeleton


def _copy_fields(source: Message, target: Message, *, but: str) -> None:
    for field, value in source.ListFields():
        is_unreadable = field.type == field.TYPE_STRING and isinstance(value, bytes)
        if field.name == but or is_unreadable:  # text that is not UTF-8 says nothing of types
            continue
        if hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)


def _stub(tensor: onnx.TensorProto) -> onnx.TensorProto:
    stub = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    stub.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "-"), ("offset", "0"), ("length", "0")):
        stub.external_data.add(key=key, value=value)
    return stub


def _skeleton(model: ir.Model) -> onnx.ModelProto:
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
