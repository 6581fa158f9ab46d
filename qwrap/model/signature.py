"""What a graph input takes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qwrap.errors import InputError
from qwrap.graph.index import ValueType
from qwrap.ops.element_types import TORCH_DTYPES


def check_input(name: str, tensor: object, expected: ValueType) -> None:
    """Refuse a tensor that cannot be graph input ``name``.

    Raises:
        InputError: its rank, or the kind of its type, is not the graph's.
    """
    if expected.kind != "tensor" or expected.dtype == ir.DataType.STRING:
        _check_other(name, tensor, expected)
        return
    dtype = None if expected.dtype is None else TORCH_DTYPES.get(expected.dtype)
    if not isinstance(tensor, Tensor):
        raise InputError(f"input {name!r}: expected a tensor, got {type(tensor).__name__}")
    both_float = dtype is not None and dtype.is_floating_point and tensor.dtype.is_floating_point
    if dtype not in (None, tensor.dtype) and not both_float:
        raise InputError(f"input {name!r}: expected {dtype}, got {tensor.dtype}; convert it")
    if expected.rank is not None and tensor.dim() != expected.rank:
        raise InputError(
            f"input {name!r}: expected {expected.rank} dimensions {list(expected.shape or ())}, "
            f"got shape {list(tensor.shape)}"
        )


def _check_other(name: str, value: object, expected: ValueType) -> None:
    """Refuse what cannot be a graph input that is no tensor of numbers."""
    if expected.kind == "sequence":
        fits, what = isinstance(value, list), "a list of tensors"
    elif expected.kind == "optional":
        fits = value is None or isinstance(value, (Tensor, list, np.ndarray))
        what = "a tensor, a list of tensors or None"
    else:
        fits, what = isinstance(value, np.ndarray), "a numpy array of text"
    if not fits:
        raise InputError(f"input {name!r}: expected {what}, got {type(value).__name__}")
