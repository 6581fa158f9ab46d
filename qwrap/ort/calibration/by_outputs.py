"""Calibration through graph outputs, for calibrators of a user's own that expect to find them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from qwrap.ort.errors import QuantizationError

Array = NDArray[Any]

_FLAT = "qwrap_flat_shape"
_AXES = "qwrap_axes_of_rank_{}"
_AXES_ARE_INPUT = 18  # opset from which on ReduceMin and ReduceMax take axes as an input


def with_extremes(model: ModelProto, names: Collection[str], per_channel: bool) -> ModelProto:
    """Return a copy with outputs ``<name>_ReduceMin`` and ``<name>_ReduceMax``, of one axis.

    Args:
        model: with declared types.
        names: tensors; those of bodies are left out.
        per_channel: keep axis 1.

    Source: the outputs are named and ordered as those of onnxruntime's ``MinMaxCalibrater``.
    """
    augmented = ModelProto()
    augmented.CopyFrom(model)
    graph = augmented.graph
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    constants = {_FLAT: [-1]}
    for value in _declared(model, names):
        rank = len(value.type.tensor_type.shape.dim)
        axes = [axis for axis in range(rank) if axis != 1] if per_channel else []
        if axes and opset >= _AXES_ARE_INPUT:
            constants[_AXES.format(rank)] = axes
        for reduction in ("ReduceMin", "ReduceMax"):
            graph.node.extend(_reduction(value.name, reduction, axes, rank, opset))
            kind = value.type.tensor_type.elem_type
            graph.output.append(
                helper.make_tensor_value_info(f"{value.name}_{reduction}", kind, [None])
            )
    for name, integers in constants.items():
        graph.initializer.append(
            helper.make_tensor(name, TensorProto.INT64, [len(integers)], integers)
        )
    return augmented


def _declared(model: ModelProto, names: Collection[str]) -> list[ValueInfoProto]:
    graph = model.graph
    known = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
    return [known[name] for name in sorted(names) if name in known]


def _reduction(
    name: str, reduction: str, axes: list[int], rank: int, opset: int
) -> tuple[NodeProto, NodeProto]:
    made = f"{name}_{reduction}"
    inputs = [name]
    attributes: dict[str, Any] = {}
    if axes and opset >= _AXES_ARE_INPUT:
        inputs.append(_AXES.format(rank))
    elif axes:
        attributes["axes"] = axes
    return (
        helper.make_node(reduction, inputs, [f"{made}_Reshape"], made, keepdims=1, **attributes),
        helper.make_node("Reshape", [f"{made}_Reshape", _FLAT], [made], f"{made}_Reshape"),
    )


def ranges_of_rows(
    names: Sequence[str], rows: Sequence[Sequence[Any]], moving_average: bool
) -> dict[str, tuple[Array, Array]]:
    """Return lowest and highest of each tensor, from outputs that come in pairs.

    Args:
        names: of the outputs after the model's own: a tensor's smallest value, then its largest,
            named after the tensor with one more ``_`` and a word.
        rows: those outputs, batch by batch.
        moving_average: average the batches instead of taking the extremes.

    Raises:
        QuantizationError: the outputs are no pairs (a ``ValueError``).
    """
    if len(names) % 2:
        raise QuantizationError(
            f"the augmented graph has {len(names)} outputs of its own; expected two for each "
            "tensor, its smallest and its largest value: override compute_data for others"
        )
    low, high = (np.nanmean, np.nanmean) if moving_average else (np.nanmin, np.nanmax)
    return {
        names[i].rpartition("_")[0]: (
            np.asarray(low([row[i] for row in rows], axis=0)),
            np.asarray(high([row[i + 1] for row in rows], axis=0)),
        )
        for i in range(0, len(names), 2)
    }


def by_name(
    names: Sequence[str], rows: Sequence[Sequence[Any]], wanted: Collection[str]
) -> Mapping[str, list[Any]]:
    """Return the values of each wanted output, batch by batch."""
    return {
        name: [row[place] for row in rows] for place, name in enumerate(names) if name in wanted
    }
