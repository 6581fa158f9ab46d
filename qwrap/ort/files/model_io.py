"""Models read as quantizers need them, and written: weights of any size, nothing beside the input.

A model that was read is the reader's own: types and shapes of its values are declared as far as
they can be known, its weights are initializers, and its data is in memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx
from google.protobuf.message import DecodeError

from qwrap.errors import ExportError
from qwrap.graph import external_problem, graphs, inferred_message, packed_size
from qwrap.ort.errors import InvalidModelError, MissingFileError, MissingFolderError
from qwrap.ort.files.lift import lift_constants
from qwrap.ort.files.metadata import add_infer_metadata
from qwrap.ort.files.proto_file import is_external, tensors_of, weightless, write_proto

ModelSource: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto"

STEERS_SHAPES = 1 << 16  # bytes; larger tensors are weights, which inference need not see


@dataclass(frozen=True)
class HeldModel:
    """A message as ``read_model`` returns it, but that heavy tensors may still lie in files.

    Attributes:
        message: the model; private to who holds it.
        path: the file it came from, beside which these tensors lie; None if none does.
    """

    message: onnx.ModelProto
    path: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Where the files with tensors lie."""
        return None if self.path is None else self.path.parent

    def take_in(self) -> onnx.ModelProto:
        """Read the tensors that lie in files into the message, in place; return it.

        Raises:
            InvalidModelError: the files are no longer what they were.
        """
        if self.path is not None:
            _take_in(self.message, self.path)
        return self.message


def read_model(model: ModelSource, lifted: set[str] | None = None) -> onnx.ModelProto:
    """Return a private copy of a model with declared types, its weights in it as initializers.

    Args:
        model: a path, or a message that stays as it is. External data may be of any size; it has
            to lie in the folder of the model.
        lifted: takes in the names of Constant nodes that became initializers.

    Raises:
        MissingFileError: the file, or one with its weights, is not there.
        InvalidModelError: it is not an ONNX model, or the message says that its weights are in
            files, of which it does not know the folder.
    """
    return hold_model(model, lifted).message


def hold_model(
    model: ModelSource, lifted: set[str] | None = None, *, in_files: bool = False
) -> HeldModel:
    """Return what ``read_model`` returns, with ``in_files`` but for the data of heavy tensors.

    Those that lie in files then stay there, checked, until ``take_in``.

    Raises:
        MissingFileError: as ``read_model``.
        InvalidModelError: as ``read_model``.
    """
    own = load_message(model, STEERS_SHAPES if in_files else None)
    names = lift_constants(own)
    if lifted is not None:
        lifted |= names
    declare_types(own)
    add_infer_metadata(own)
    return HeldModel(own, None if isinstance(model, onnx.ModelProto) else Path(model))


def load_message(model: ModelSource, heavy: int | None = None) -> onnx.ModelProto:
    """Return a private copy of a model with its external data in it, and nothing else changed.

    Args:
        model: a path, or a message that stays as it is.
        heavy: external tensors of so many bytes are checked, but stay where they are.

    Raises:
        MissingFileError: as ``read_model``.
        InvalidModelError: as ``read_model``.
    """
    own = onnx.ModelProto()
    if isinstance(model, onnx.ModelProto):
        own.CopyFrom(model)
        outside = next((t.name for t in tensors_of(own) if is_external(t)), None)
        if outside is not None:
            raise InvalidModelError(
                f"the data of tensor '{outside}' lies in a file beside the model; load it with "
                "onnx.load(path), or give the path of the model"
            )
        return own
    path = Path(model)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected an ONNX model")
    try:
        own.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InvalidModelError(f"{path}: not an ONNX model, or cut off ({error})") from error
    if not own.HasField("graph"):
        raise InvalidModelError(f"{path}: not an ONNX model: it has no graph")
    _take_in(own, path, heavy)
    return own


def write_model(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    use_external_data_format: bool = False,
) -> None:
    """Write ``model``, which stays as it is, to ``path``: all of it or nothing.

    Weights go to ``<name>.data`` beside it if asked, or if they are too large for one message.

    Raises:
        ExportError: the folder does not exist (a ``FileNotFoundError`` too) or cannot be written
            to.
    """
    try:
        write_proto(model, path, external=use_external_data_format or None)
    except ExportError as error:
        if Path(path).parent.is_dir():
            raise
        raise MissingFolderError(str(error)) from error


def declare_types(model: onnx.ModelProto) -> None:
    """Declare types and shapes of values, in place, in every graph, as far as they can be known.

    Works for models of any size, with operators of other domains and with symbolic shapes; what
    cannot be inferred remains as it was declared.
    """
    skeleton, _ = weightless(model, STEERS_SHAPES)
    inferred = inferred_message(skeleton)
    for graph, known in zip(graphs(model.graph), graphs(inferred.graph), strict=True):
        _take_over(graph, known)


def _take_over(graph: onnx.GraphProto, known: onnx.GraphProto) -> None:
    """Declare in ``graph``, in place, what is known of its values, and what it declared before."""
    made = {name for node in graph.node for name in node.output}
    made -= {value.name for value in graph.output}
    values = {value.name: value for value in known.value_info if value.name in made}
    for declared in graph.value_info:
        if declared.name in values:
            _keep_symbols(declared.type.tensor_type, values[declared.name].type.tensor_type)
        elif declared.name in made:
            values[declared.name] = declared
    kept = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in values.values()]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for output, other in zip(graph.output, known.output, strict=True):
        if other.HasField("type"):
            _keep_symbols(output.type.tensor_type, other.type.tensor_type)
            output.type.CopyFrom(other.type)


def _keep_symbols(declared: Any, found: Any) -> None:
    """Let dimensions of ``found`` that nobody knows bear the names they had, in place."""
    if len(declared.shape.dim) != len(found.shape.dim):
        return
    for old, new in zip(declared.shape.dim, found.shape.dim, strict=True):
        if old.dim_param and not new.HasField("dim_value"):
            new.dim_param = old.dim_param


def model_has_external_data(model_path: str | os.PathLike[str]) -> bool:
    """Whether initializers of a file lie in other files."""
    model = onnx.load(os.fspath(model_path), load_external_data=False)
    return any(is_external(tensor) for tensor in model.graph.initializer)


def load_model_with_shape_infer(model_path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the model of a file; see ``read_model``."""
    return read_model(model_path)


def save_and_reload_model_with_shape_infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of ``model`` with declared types; see ``read_model``. Nothing is saved."""
    return read_model(model)


def _take_in(model: onnx.ModelProto, path: Path, heavy: int | None = None) -> None:
    """Read external data into the message, in place; only files in the folder of ``path``."""
    for tensor in tensors_of(model):
        if not is_external(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location, size = entries.get("location", ""), packed_size(tensor)
        try:
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
        except ValueError as error:
            raise InvalidModelError(
                f"{path}: tensor '{tensor.name}': offset or length is not a number"
            ) from error
        problem = external_problem(location, offset, length, size, path.parent)
        if problem:
            kind = MissingFileError if "is missing" in problem else InvalidModelError
            raise kind(f"{path}: tensor '{tensor.name}': {problem}")
        if heavy is not None and size >= heavy:
            continue
        with (path.parent / location).open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(size)
        del tensor.external_data[:]
        tensor.ClearField("data_location")
