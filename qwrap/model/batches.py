"""What a user hands over as data, turned into the tensors of the graph inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import InputError
from qwrap.graph.index import OnnxGraph, ValueType
from qwrap.model.signature import check_input
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.element_types import TORCH_DTYPES


def iterate(
    batches: Iterable[Any],
    model: WrappedModel | OnnxGraph,
    *,
    may_be_empty: bool = False,
    finite: bool = True,
) -> Iterator[dict[str, Any]]:
    """Yield every batch as ``to_inputs`` returns it, one at a time.

    Args:
        batches: any iterable of batches, such as a ``DataLoader``, or an object whose
            ``get_next()`` returns batches and then None (onnxruntime's ``CalibrationDataReader``).
        model: whose graph inputs the batches are for.
        may_be_empty: whether no batches are fine.
        finite: whether NaN and infinity are refused.

    Raises:
        InputError: there are no batches, or one does not fit; the message counts from batch 0.
    """
    index = -1
    for index, batch in enumerate(_each(batches)):
        try:
            inputs = to_inputs(batch, model, finite=finite)
        except InputError as error:
            raise InputError(f"batch {index}: {error}") from error
        yield inputs
    if index < 0 and not may_be_empty:
        raise InputError("no batches: the data is empty (or an iterator that was already used up)")


def count_batches(batches: object) -> int | None:
    """Return how many batches there are, None if that shows only while they are read."""
    # Data loaders and readers of unknown length have a __len__ too; it raises.
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def to_inputs(
    batch: Any, model: WrappedModel | OnnxGraph, *, finite: bool = True
) -> dict[str, Any]:
    """Return one batch as graph-input name -> tensor of that input's type, on the model's device.

    Text, sequences and optionals are what ``WrappedModel.forward`` takes for them.

    Args:
        batch: a tensor or array for a graph with one input; a tuple, or a list that holds tensors
            or arrays, in graph-input order (items beyond the graph inputs, such as labels, are
            ignored); or a mapping from graph-input name (other keys are ignored). Floats may be
            of any width; a list of numbers is an array.
        model: whose graph inputs the batch is for.
        finite: whether NaN and infinity are refused.

    Raises:
        InputError: a graph input is missing, has another rank or kind of type than in the graph,
            or is a float that holds NaN or infinity.
    """
    graph = model if isinstance(model, OnnxGraph) else model.graph
    device = _device(model)
    types = {value.name or "": graph.type_of(value) for value in graph.inputs}
    given = _by_name(batch, list(types))
    inputs = {name: _to_input(name, given[name], kind, finite) for name, kind in types.items()}
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _device(model: WrappedModel | OnnxGraph) -> torch.device:
    if isinstance(model, OnnxGraph):
        return torch.device("cpu")
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _each(batches: Any) -> Iterator[Any]:
    if hasattr(batches, "get_next"):
        while (batch := batches.get_next()) is not None:
            yield batch
        return
    if isinstance(batches, (Tensor, np.ndarray, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is a {type(batches).__name__}; give an iterable of batches, such as a "
            "DataLoader or a list"
        )
    yield from batches


def _by_name(batch: Any, names: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if missing:
            raise InputError(
                f"graph inputs {missing} are missing; the mapping has {sorted(map(str, batch))}"
            )
        return batch
    items = _items(batch, len(names))
    if len(items) < len(names):
        raise InputError(f"got {len(items)} inputs; the graph has {len(names)}: {list(names)}")
    return dict(zip(names, items, strict=False))


def _items(batch: Any, count: int) -> Sequence[Any]:
    """Return what is there for each graph input; a ``DataLoader`` makes lists of its tuples."""
    arrays = isinstance(batch, list) and any(isinstance(b, (Tensor, np.ndarray)) for b in batch)
    if isinstance(batch, tuple) or arrays or (isinstance(batch, list) and count > 1):
        items: Sequence[Any] = batch
        return items
    return (batch,)


def _to_input(name: str, value: Any, expected: ValueType, finite: bool) -> Any:
    if expected.kind != "tensor" or expected.dtype == ir.DataType.STRING:
        value = [_detached(name, v) for v in value] if isinstance(value, list) else value
        check_input(name, value, expected)
        return value
    tensor = _detached(name, value)
    check_input(name, tensor, expected)
    dtype = tensor.dtype if expected.dtype is None else TORCH_DTYPES.get(expected.dtype)
    tensor = tensor.to(dtype)
    if finite and tensor.is_floating_point():
        bad = int(tensor.isfinite().logical_not_().sum())
        if bad:
            raise InputError(
                f"input {name!r}: {bad} of {tensor.numel()} values are NaN or infinite; "
                "look for what made them, or leave the batch out"
            )
    return tensor


def _detached(name: str, value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else _from_array(name, value)


def _from_array(name: str, value: Any) -> Tensor:
    try:
        array = np.asarray(value)
        if array.dtype == np.float64 and not hasattr(value, "dtype"):
            array = array.astype(np.float32)  # Python floats have no width of their own
        # torch takes neither negative strides nor the other byte order, and warns of read-only.
        array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"input {name!r}: cannot make a tensor of a {type(value).__name__} ({error})"
        ) from error
