"""What a model file asks for: its graph inputs, read without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from qwrap.errors import InputError, ModelError

Array = NDArray[Any]
Batch = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One graph input.

    Attributes:
        name: ONNX name.
        dtype: numpy type of its elements.
        shape: one entry per dimension, None where the model leaves it open; None as a whole
            where the model gives no shape at all.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{shape_text(self.shape)}"

    def convert(self, array: Array, where: str) -> Array:
        """Return ``array`` in this input's dtype, after comparing shapes.

        Raises:
            InputError: the conversion would change what the values mean (integers for a float
                input carry unscaled pixels more often than not), or the shape does not fit.
        """
        if self.shape is not None and not _fits(array.shape, self.shape):
            raise InputError(
                f"{where}: input {self.name!r} got an array of shape {shape_text(array.shape)}; "
                f"the model takes {shape_text(self.shape)}"
            )
        if array.dtype.kind != self.dtype.kind and {array.dtype.kind, self.dtype.kind} != {*"iu"}:
            raise InputError(
                f"{where}: input {self.name!r} got {array.dtype}; the model takes {self.dtype}; "
                f"convert the array, in the units that the model was trained on"
            )
        converted = array.astype(self.dtype, copy=False)
        if array.dtype.kind in "iu" and not np.array_equal(converted, array):
            raise InputError(
                f"{where}: input {self.name!r} got {array.dtype} values that do not fit into "
                f"the model's {self.dtype}; check the array, it may belong to another input"
            )
        return converted


def graph_inputs(path: str | Path) -> list[GraphInput]:
    """Return the graph inputs of the model at ``path``, initialisers left out.

    Raises:
        ModelError: there is no such file, it is no ONNX model, or an input is not a tensor.
    """
    graph = read_structure(path).graph
    initialised = {tensor.name for tensor in graph.initializer}  # listed as inputs before IR 4
    return [_graph_input(value, path) for value in graph.input if value.name not in initialised]


def read_structure(path: str | Path) -> onnx.ModelProto:
    """Return the model at ``path`` without its external data.

    Raises:
        ModelError: there is no such file, or it is no ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path}: not an ONNX model; is the file complete?") from error
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{path}: holds no ONNX graph; is it the right file?")
    return model


def shape_text(shape: tuple[int | None, ...] | None) -> str:
    """Return ``shape`` as in ``[?, 3, 224, 224]``."""
    if shape is None:
        return "[...]"
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _graph_input(value: onnx.ValueInfoProto, path: str | Path) -> GraphInput:
    if not value.type.HasField("tensor_type"):
        raise ModelError(
            f"{path}: input {value.name!r} is not a tensor; files cannot hold it, "
            f"give a module:function that yields batches"
        )
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return GraphInput(
        name=value.name,
        dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
        shape=shape if tensor.HasField("shape") else None,
    )


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        size is None or size == have for size, have in zip(wanted, found, strict=True)
    )
