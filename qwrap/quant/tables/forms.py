"""The forms of range files by name, and how to tell which one a file has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from qwrap.errors import TableError
from qwrap.quant.tables import (
    encodings_v0,
    encodings_v1,
    encodings_v2,
    onnxruntime_cache,
    tensorrt_cache,
    tensorrt_flatbuffers,
    tensorrt_json,
    tensorrt_text,
)
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.document import BOM, parse

Form = Literal[
    "onnxruntime",
    "tensorrt",
    "tensorrt-flatbuffers",
    "tensorrt-json",
    "tensorrt-text",
    "aimet-0.6.1",
    "aimet-1.0.0",
    "aimet-2.0.0",
    "qnn",
]
FORMS: tuple[str, ...] = get_args(Form)

_DOCUMENTS: dict[str, Callable[[object], Contents]] = {
    "onnxruntime": onnxruntime_cache.read,
    "tensorrt-json": tensorrt_json.read,
    "aimet-0.6.1": encodings_v0.read,
    "aimet-1.0.0": encodings_v1.read,
    "aimet-2.0.0": encodings_v2.read,
    "qnn": encodings_v0.read,
}
_FILES: dict[str, Callable[[bytes], Contents]] = {
    "tensorrt": tensorrt_cache.read,
    "tensorrt-flatbuffers": tensorrt_flatbuffers.read,
    "tensorrt-text": tensorrt_text.read,
}
_WRITERS: dict[str, Callable[[Contents], bytes]] = {
    "onnxruntime": onnxruntime_cache.write,
    "tensorrt": tensorrt_cache.write,
    "tensorrt-flatbuffers": tensorrt_flatbuffers.write,
    "tensorrt-json": tensorrt_json.write,
    "tensorrt-text": tensorrt_text.write,
    "aimet-0.6.1": partial(encodings_v0.write, form=encodings_v0.AIMET),
    "aimet-1.0.0": encodings_v1.write,
    "aimet-2.0.0": encodings_v2.write,
    "qnn": partial(encodings_v0.write, form=encodings_v0.QNN),
}


def decode_table(data: bytes, form: str | None) -> Contents:
    """Return what a file holds.

    Args:
        data: all of the file.
        form: one of ``FORMS``, None to find out.

    Raises:
        TableError: the file is broken, or of no known form.
    """
    if form in _FILES:
        return _FILES[form](data)
    if form is None:
        if not data.strip():
            raise TableError(f"is empty; {_KNOWN}")
        if data.startswith(tensorrt_cache.MAGIC):
            return tensorrt_cache.read(data)
        if b"\0" in data[:4]:  # the first offset; no text begins like this
            return tensorrt_flatbuffers.read(data)
        if data.removeprefix(BOM).lstrip()[:1] not in (b"{", b"["):
            return _read_lines(data)
    document = parse(data)
    return _DOCUMENTS[form or _form_of(document)](document)


def encode_table(contents: Contents, form: str) -> bytes:
    """Return the file that holds ``contents`` in ``form``.

    Raises:
        TableError: the form cannot hold them.
    """
    try:
        return _WRITERS[form](contents)
    except UnicodeEncodeError as error:
        raise TableError(f"name {error.object!r} is not text that a file can hold") from error


def check_form(form: str | None) -> None:
    """Refuse a form that there is not.

    Raises:
        TableError: ``form`` is neither None nor one of ``FORMS``.
    """
    if form is not None and form not in FORMS:
        raise TableError(f"form {form!r}: choose one of {', '.join(FORMS)}")


def _read_lines(data: bytes) -> Contents:
    try:
        return tensorrt_text.read(data)
    except TableError as error:
        raise TableError(f"is of no known form (as text: {error}); {_KNOWN}") from error


def _form_of(document: object) -> str:
    """Return the form of a JSON file.

    Raises:
        TableError: it has none.
    """
    if not isinstance(document, dict) or not document:
        raise TableError(f"is JSON of no known form; {_KNOWN}")
    if document.get("CLS") == "TensorsData":
        return "onnxruntime"
    if isinstance(document.get("encodings"), list):
        return _supported(document, "aimet-2.0.0")
    sections = [document[name] for name in encodings_v0.SECTIONS if name in document]
    if any(isinstance(section, list) for section in sections):
        return _supported(document, "aimet-1.0.0")
    if sections:
        return _supported(document, "aimet-0.6.1") if "version" in document else "qnn"
    if all(isinstance(value, (dict, list, int, float)) for value in document.values()):
        return "tensorrt-json"
    raise TableError(f"is JSON of no known form; {_KNOWN}")


def _supported(document: dict[str, object], form: str) -> str:
    """Return ``form`` if the file's version is of its kind."""
    version = document.get("version", form.partition("-")[2])
    if not isinstance(version, str) or version.split(".")[0] != form.partition("-")[2][0]:
        raise TableError(f"is of version {version!r}, but built like {form}")
    return form


_KNOWN = f"known forms are {', '.join(FORMS)}"
