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
        return _from_proto(source, "the ModelProto", None)
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
        model = ir.from_proto(proto)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # text that is not UTF-8 too
        raise ModelError(f"{where}: malformed graph: {error}") from error
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    return model


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
    return model


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors that lie in files, those in subgraphs and attributes included."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


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
