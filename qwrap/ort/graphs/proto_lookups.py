"""Small look-ups in protobuf messages and lists, by onnxruntime's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx
from onnx import AttributeProto, NodeProto

from qwrap.ort.errors import QuantizationError

Named = TypeVar("Named")

_FIELDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
}


def attribute_to_kwarg(attribute: AttributeProto) -> dict[str, Any]:
    """Return ``{name: value}`` of an attribute, as ``onnx.helper.make_node`` takes it.

    Raises:
        QuantizationError: it has no type, or a sparse tensor's or a type's (a ``ValueError``).
    """
    if attribute.type == AttributeProto.UNDEFINED:
        raise QuantizationError(f"attribute {attribute.name} does not have type specified.")
    if attribute.type not in _FIELDS:
        raise QuantizationError(
            f"attribute {attribute.name} has unsupported type {attribute.type}."
        )
    return {attribute.name: getattr(attribute, _FIELDS[attribute.type])}


def find_by_name(item_name: str, item_list: Iterable[Named]) -> Named | None:
    """Return the first of ``item_list`` with that ``name``, None if there is none."""
    return next((i for i in item_list if getattr(i, "name", None) == item_name), None)


def get_elem_index(elem_name: Any, elem_list: Sequence[Any]) -> int:
    """Return the last index of ``elem_name`` in ``elem_list``, -1 if it is not in it."""
    return max((i for i, elem in enumerate(elem_list) if elem == elem_name), default=-1)


def get_mul_node(inputs: Sequence[str], output: str, name: str) -> NodeProto:
    """Return a Mul node."""
    return onnx.helper.make_node("Mul", inputs, [output], name)


def generate_identified_filename(filename: Path, identifier: str) -> Path:
    """Return the path with ``identifier`` before its suffix: ``a/model-inferred.onnx``."""
    return filename.with_name(filename.stem + identifier + filename.suffix)
