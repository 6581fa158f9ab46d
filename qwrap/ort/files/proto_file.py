"""A message in a file: written whole or not at all, its weights beside it where they are large."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from qwrap.graph import graphs, packed_size, replace_file
from qwrap.ort.errors import QuantizationError

LIMIT = 2_000_000_000  # bytes; protobuf refuses messages of 2 GiB
THRESHOLD = 1024  # bytes: what is smaller stays in the message, where shape inference can read it
_WEIGHT = "qwrap-weight-"
_PAGE = 4096  # what is mapped must begin at a page
_DATA_FIELDS = (
    *("raw_data", "float_data", "int32_data", "int64_data", "uint64_data", "double_data"),
    *("string_data", "external_data", "data_location"),
)
Tensors = list[tuple[onnx.TensorProto, onnx.TensorProto]]


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the data of a tensor lies in a file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers, and those in attributes; bodies included."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        yield from attribute_tensors(graph.node)
    for function in model.functions:
        yield from attribute_tensors(function.node)


def attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Yield the tensors in the attributes of nodes, bodies not entered."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def weights_size(model: onnx.ModelProto) -> int:
    """Return how many bytes the tensors of a model take that lie in the message."""
    return sum(packed_size(tensor) for tensor in tensors_of(model) if not is_external(tensor))


def raw_bytes(tensor: onnx.TensorProto) -> bytes:
    """Return the data of a tensor as files hold it, whichever field it is in."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return ir.tensor(tensor).tobytes()


def without_data(
    model: onnx.ModelProto, threshold: int, *, attributes: bool = True
) -> tuple[onnx.ModelProto, Tensors]:
    """Return a copy of ``model`` in which heavy tensors have no data, and these with their source.

    Initializers of the main graph are never copied. The copy is a message like any other, except
    that its heavy tensors are empty.

    Args:
        model: not modified.
        threshold: bytes from which on a tensor is heavy; one that lies in a file never is.
        attributes: whether tensors in attributes of nodes count as well.
    """

    def is_heavy(tensor: onnx.TensorProto) -> bool:
        return packed_size(tensor) >= max(1, threshold) and not is_external(tensor)

    copy = onnx.ModelProto()
    _copy_fields(model, copy, but="graph")
    _copy_fields(model.graph, copy.graph, but="initializer")
    pairs: Tensors = []
    inner = [t for g in graphs(copy.graph) for t in g.initializer]
    for own in [t for t in (tensors_of(copy) if attributes else inner) if is_heavy(t)]:
        source = onnx.TensorProto()
        source.CopyFrom(own)
        own.Clear()
        pairs.append((_stub(source, own), source))
    for tensor in model.graph.initializer:
        if is_heavy(tensor):
            pairs.append((_stub(tensor, copy.graph.initializer.add()), tensor))
        else:
            copy.graph.initializer.append(tensor)
    return copy, pairs


def weightless(
    model: onnx.ModelProto, threshold: int
) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """Return a copy of ``model`` whose heavy tensors say they lie in files, and the tensors.

    The name of the file ends with the number of the tensor; see ``with_weights``.
    """
    copy, pairs = without_data(model, threshold)
    for number, (stub, _) in enumerate(pairs):
        stub.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", f"{_WEIGHT}{number}"), ("offset", "0"), ("length", "0")):
            stub.external_data.add(key=key, value=value)
    return copy, [source for _, source in pairs]


def with_weights(model: onnx.ModelProto, tensors: list[onnx.TensorProto]) -> None:
    """Give the tensors of a ``weightless`` model their data back, in place."""
    for tensor in [t for t in tensors_of(model) if is_external(t)]:
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if location.startswith(_WEIGHT):
            name = tensor.name
            tensor.CopyFrom(tensors[int(location.removeprefix(_WEIGHT))])
            tensor.name = name


def write_proto(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    location: str | None = None,
    threshold: int = THRESHOLD,
    one_file: bool = True,
    attributes: bool = True,
) -> None:
    """Write ``model``, which stays as it is, to ``path``: all of it or nothing.

    Args:
        model: what to write. Tensors that say they lie in a file keep saying so.
        path: the file to make or replace.
        external: whether weights go to a file beside it. None: where they need one.
        location: name of that file, relative to the folder of ``path``; ``<name>.data``.
        threshold: bytes from which on a tensor goes there.
        one_file: False gives each tensor a file, named after it.
        attributes: whether tensors in attributes go there too.

    Raises:
        ExportError: the folder does not exist or cannot be written to, or ``location`` leaves it.
    """
    target = Path(path)
    outside = weights_size(model) > LIMIT if external is None else external
    if not outside:
        replace_file(target, lambda draft: _write_bytes(draft, model.SerializeToString()))
        return
    copy, pairs = without_data(model, threshold, attributes=attributes)
    name = _checked(target, location)
    replace_file(target, lambda draft: _write_draft(draft, copy, pairs, name, one_file))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _checked(target: Path, location: str | None) -> str:
    if location is None:
        return f"{target.name}.data"
    path = Path(location)
    if not location or path.is_absolute() or ".." in path.parts:
        raise QuantizationError(
            f"external data location '{location}' leaves the folder of the model; give a relative "
            "path"
        )
    if path == Path(target.name):
        raise QuantizationError(f"external data location '{location}' is the model itself")
    return location


def _write_draft(
    draft: Path, proto: onnx.ModelProto, pairs: Tensors, location: str, one_file: bool
) -> list[str]:
    """Write message and data beside each other; ``proto`` learns where the data lies, in place.

    Returns:
        The names of the files with data.
    """
    names = []
    if one_file and pairs:
        file = draft.parent / location
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as opened:
            for stub, source in pairs:
                _append(opened, stub, source, location)
        names.append(location)
    elif pairs:
        taken = {draft.name}
        for stub, source in pairs:
            own = _own_name(stub.name, draft.name, taken)
            with (draft.parent / own).open("wb") as opened:
                _append(opened, stub, source, own)
            names.append(own)
    draft.write_bytes(proto.SerializeToString())
    return names


def _own_name(name: str, model: str, taken: set[str]) -> str:
    """Return a free name for the file of one tensor: its own where that can be a file's."""
    if not re.fullmatch(r"[^<>:\"/\\|?*\x00-\x1f]{1,200}", name) or not name.strip("."):
        name = f"{model}.data"
    free, count = name, 1
    while free in taken:
        free, count = f"{name}.{count}", count + 1
    taken.add(free)
    return free


def _append(
    file: BinaryIO, stub: onnx.TensorProto, source: onnx.TensorProto, location: str
) -> None:
    data = raw_bytes(source)
    file.seek(-file.tell() % (_PAGE if len(data) >= _PAGE else 16), os.SEEK_CUR)
    stub.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", file.tell()), ("length", len(data))):
        stub.external_data.add(key=key, value=str(value))
    file.write(data)


def _stub(source: onnx.TensorProto, target: onnx.TensorProto) -> onnx.TensorProto:
    """Give ``target``, in place, all of ``source`` but its data; return it."""
    for field, value in source.ListFields():
        if field.name in _DATA_FIELDS:
            continue
        if hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)
    return target


def _copy_fields(source: Message, target: Message, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
            getattr(target, field.name).extend(value)
        elif isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
