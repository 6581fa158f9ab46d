"""Small look-ups and conversions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwrap.ort.errors import UnsupportedError

__all__ = ["MAXIMUM_PROTOBUF", "find_by_name", "simple_progress_bar", "to_numpy"]

MAXIMUM_PROTOBUF = 2147483648


def simple_progress_bar(total: int, i: int) -> None:
    """Do nothing; kept for scripts that import it. What is done is logged."""
    del total, i


def find_by_name(name: str, item_list: Iterable[Any]) -> Any:
    """Return the first item of that name, None if there is none."""
    return next((item for item in item_list if item.name == name), None)


def to_numpy(data: Any) -> NDArray[Any]:
    """Return a tensor, an array or what can become one as an array; bfloat16 becomes float32.

    Raises:
        UnsupportedError: it cannot become one (an ``AssertionError``).
    """
    if isinstance(data, np.ndarray):
        return data
    if isinstance(data, torch.Tensor):
        tensor = data.detach().cpu()
        wide = {torch.bfloat16: torch.float32, torch.chalf: torch.cfloat}
        array: NDArray[Any] = tensor.to(wide.get(tensor.dtype, tensor.dtype)).numpy()
        return array
    try:
        return np.array(data)
    except (ValueError, TypeError) as error:
        raise UnsupportedError(
            f"The input data for onnx model is {type(data)}, which is not supported to convert to "
            "numpy ndarrays."
        ) from error
