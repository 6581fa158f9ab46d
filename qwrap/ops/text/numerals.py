"""Numbers as text and back: numpy arrays of ``str`` objects, as text travels."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwrap.errors import InputError
from qwrap.minifloat import FLOAT8
from qwrap.ops.element_types import TORCH_DTYPES

Text = np.ndarray[Any, np.dtype[np.object_]]

SPECIAL = {"nan": "NaN", "-nan": "NaN", "inf": "INF", "-inf": "-INF"}
INTEGER = re.compile(r"\s*([+-]?\d+)")


def to_text(x: Tensor) -> Text:
    """Return numbers as text, as onnxruntime prints them: floats with eight digits (``%.8g``)."""
    x = x.detach().cpu()
    if not x.dtype.is_floating_point:
        array = x.to(torch.uint8).numpy() if x.dtype == torch.bool else x.numpy()
        return array.astype(np.str_).astype(object)
    number = x.to(torch.float64).numpy()
    printed = np.char.mod("%.8g", number)
    for lower, name in SPECIAL.items():
        printed = np.where(printed == lower, name, printed)
    return printed.astype(object)


def from_text(text: Text, data_type: int) -> Tensor:
    """Return the numbers that ``text`` spells, of an ``onnx.TensorProto`` data type, on the CPU.

    Integers stop at the first character that is no digit, and wrap, as in onnxruntime.

    Raises:
        InputError: an element spells no number.
    """
    dtype = TORCH_DTYPES[data_type]
    floating = dtype.is_floating_point or data_type in FLOAT8
    try:
        if floating:
            # Parsed as float64 and rounded after that, but for float16, as in onnxruntime.
            wide = np.float64 if dtype == torch.float64 else np.float32
            with np.errstate(over="ignore"):
                return torch.from_numpy(text.astype(np.str_).astype(np.float64).astype(wide))
        numbers = [_integer(item) & 0xFFFF_FFFF_FFFF_FFFF for item in text.flat]
    except ValueError as error:
        raise InputError(f"cannot cast text to a number: {error}") from error
    unsigned = np.array(numbers, np.uint64).reshape(text.shape)
    return torch.from_numpy(unsigned.view(np.int64))


def _integer(item: str) -> int:
    found = INTEGER.match(item)
    if found is None:
        raise ValueError(f"{item!r} is no integer")
    return int(found.group(1))
