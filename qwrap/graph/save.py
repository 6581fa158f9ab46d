"""Write a model so that a reader never sees half of it."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from qwrap.errors import ExportError
from qwrap.graph.original import Piece, entries

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

    def write(draft: Path) -> None:
        ir.save(model, draft, external_data=data_name if outside else None)
        if check is not None:
            check(draft)

    replace_file(target, write)


def write_message(
    proto: onnx.ModelProto,
    pieces: Sequence[Piece],
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
) -> None:
    """Write a message with the data of its tensors to ``path``, all of it or nothing.

    Data is copied block by block, from files to a file without ever being in memory as a whole.
    Both files are written beside their targets first and then take their names, so that a model
    which was loaded from files of these names can go on reading them.

    Args:
        proto: changed in place: it takes in what does not go to a file.
        pieces: its tensors.
        path: the file to make or replace. External data goes to ``<name>.data`` beside it.
        external_data: None keeps data where it was, in the message or in a file (at the offsets
            it had there, if it was one), unless it is too much for a message.

    Raises:
        ExportError: the folder does not exist or cannot be written, or the message would be too
            large.
    """
    target = Path(path)
    check_target(target)
    outside, inside = _divide(proto, pieces, external_data)
    for piece in inside:
        _fill(piece)

    def write(draft: Path) -> None:
        if outside:
            name = f"{target.name}.data"
            with (draft.parent / name).open("wb") as file:
                for piece, offset in _offsets(outside):
                    file.seek(offset)
                    for block in piece.blocks():
                        file.write(block)
                    _point_to(piece, name, offset)
        draft.write_bytes(proto.SerializeToString())

    replace_file(target, write)


def filled(proto: onnx.ModelProto, pieces: Sequence[Piece]) -> onnx.ModelProto:
    """Return a message that has taken in, in place, the data of all its tensors."""
    for piece in pieces:
        if piece.new is not None or piece.file is not None:
            _fill(piece)
    return proto


def replace_file(target: Path, write: Callable[[Path], Iterable[str] | None]) -> None:
    """Let ``write`` make a file, and its data beside it, and let them take the place of others.

    Args:
        target: the file to make or replace.
        write: is called with a path of the same name in a folder of its own. It may return names
            of files that it made there, which go to the folder of ``target`` too.

    Raises:
        ExportError: the folder cannot be written to, or the disk is full.
    """
    check_target(target)
    data_name = f"{target.name}.data"
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / target.name
            for name in dict.fromkeys((*(write(draft) or ()), data_name)):
                if (draft.parent / name).exists():
                    (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(draft.parent / name, target.parent / name)
            os.replace(draft, target)
    except OSError as error:
        raise ExportError(f"{target}: cannot be written: {error.strerror or error}") from error


def replace_text(target: Path, text: str) -> None:
    """Let a file of text take the place of another one, all of it or nothing.

    Raises:
        ExportError: the folder cannot be written to, or the disk is full.
    """

    def write(draft: Path) -> None:
        draft.write_text(text, encoding="utf-8")

    replace_file(target, write)


# --- pieces --------------------------------------------------------------------------------------

INSIDE = 1024  # bytes: what is smaller stays in the message, where shape inference can read it
PAGE = 4096  # bytes; what is mapped must begin at a page


def _divide(
    proto: onnx.ModelProto, pieces: Sequence[Piece], external_data: bool | None
) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces whose data goes to the file, and those whose data the message takes in."""
    if external_data is None:
        total = proto.ByteSize() + sum(p.size for p in pieces if p.file is None and p.new)
        external_data = True if total > PROTO_LIMIT else None
    outside = [
        piece
        for piece in pieces
        if external_data is not False
        and (piece.file is not None or (external_data and piece.size > INSIDE))
    ]
    kept = {id(piece) for piece in outside}
    inside = [p for p in pieces if id(p) not in kept and (p.new is not None or p.file is not None)]
    if sum(piece.size for piece in inside) > PROTO_LIMIT:
        raise ExportError(
            "the weights are too large for one message; write with external_data=True"
        )
    return outside, inside


def _offsets(pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
    """Return where the data of each piece is to begin: where it did, if it came from one file."""
    old = sorted((p.offset, p.offset + p.size) for p in pieces if p.file is not None)
    overlap = any(a[1] > b[0] for a, b in itertools.pairwise(old))
    keep = len({id(p.file) for p in pieces if p.file is not None}) == 1 and not overlap
    end = old[-1][1] if keep else 0
    placed = []
    for piece in pieces:
        if keep and piece.file is not None:
            placed.append((piece, piece.offset))
            continue
        end += -end % (PAGE if piece.size >= PAGE else 16)
        placed.append((piece, end))
        end += piece.size
    return placed


def _fill(piece: Piece) -> None:
    """Put the data of a piece into the message."""
    if piece.new is not None and piece.new.dtype == ir.DataType.STRING:
        texts = [str(text).encode() for text in piece.new.numpy().flat]
        _clear(piece)
        piece.proto.string_data.extend(texts)
    else:
        data = b"".join(piece.blocks())  # first, for where it lies is about to be forgotten
        _clear(piece)
        piece.proto.raw_data = data


def _point_to(piece: Piece, location: str, offset: int) -> None:
    """Let a piece say that its data is in a file; what else it says of the file stays if true."""
    old = {} if piece.new is not None else entries(piece.proto)
    new = {**old, "location": location, "offset": str(offset), "length": str(piece.size)}
    if piece.new is None and piece.file is not None:  # as sparing with words as it was
        new = {k: v for k, v in new.items() if k in old or (k == "offset" and offset)}
    _clear(piece)
    piece.proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in new.items():
        piece.proto.external_data.add(key=key, value=value)


def _clear(piece: Piece) -> None:
    for name in DATA_FIELDS:
        piece.proto.ClearField(name)
    if piece.new is not None:
        piece.proto.data_type = int(piece.new.dtype)
        piece.proto.dims[:] = piece.new.shape.numpy()


DATA_FIELDS = (
    *("raw_data", "float_data", "int32_data", "int64_data", "uint64_data", "double_data"),
    *("string_data", "external_data", "data_location"),
)


# --- onnx_ir -------------------------------------------------------------------------------------


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
