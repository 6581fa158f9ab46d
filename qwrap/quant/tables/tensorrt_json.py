"""The table for TensorRT that onnxruntime writes as JSON: calibration.json, name to range.

Older releases wrote ``[low, high]`` or the absolute maximum for each name; both are read.

Source: ``write_calibration_table`` of onnxruntime.quantization.quant_utils.
"""

from __future__ import annotations

import numpy as np

from qwrap.errors import TableError
from qwrap.quant.tables.contents import Contents, per_tensor
from qwrap.quant.tables.document import Fields, at_tensor, numbers, render
from qwrap.quant.tables.onnxruntime_cache import plain, tensor_data
from qwrap.quant.tables.tensor_range import TensorRange


def read(document: object) -> Contents:
    """Return what a parsed table holds."""
    contents = Contents()
    for name, value in Fields(document).values.items():
        with at_tensor(name):
            contents.add(name, tensor_data(value) if isinstance(value, dict) else _ends(value))
    return contents


def _ends(value: object) -> TensorRange:
    ends = numbers(value)
    if ends.ndim == 0:
        return TensorRange(-np.abs(ends), np.abs(ends))
    if ends.shape != (2,):
        raise TableError(f"is of shape {list(ends.shape)}; expected [low, high]")
    return TensorRange(ends[0], ends[1])


def write(contents: Contents) -> bytes:
    """Return the table; weights are left out, for TensorRT chooses their scales itself."""
    contents.refuse_floating("TensorRT's table")
    data = {
        name: plain(per_tensor(name, entry, "TensorRT's table"))
        for name, entry in contents.activations()
    }
    return render(data, indent=None)
