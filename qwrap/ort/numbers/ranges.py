"""Ranges that follow from operators, whatever was observed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto

from qwrap.ort.calibrate import TensorData
from qwrap.ort.graphs.scopes import node_reads

_BESIDE_RANGE = ("avg", "std", "hist", "hist_edges", "bins")


def adjusted_ranges(
    ranges: Any, graphs: Iterable[GraphProto], chosen: Callable[[NodeProto], bool]
) -> dict[str, TensorData]:
    """Return ``ranges`` as a dictionary of its own, narrowed to what operators let through.

    What only a Clip or a Relu reads gets the range of its output: what lies outside is cut off
    anyway. A Softmax gives numbers from 0 to 1.

    Args:
        ranges: tensor -> ``TensorData``.
        graphs: a graph and the bodies within that are quantized too.
        chosen: whether a node is.

    Raises:
        TypeError: a range is no ``TensorData``.
    """
    found = dict(ranges.items())
    for graph in graphs:
        readers = Counter(name for node in graph.node for name in node_reads(node))
        # a graph output is read too, and has to keep what a Relu would cut off
        readers.update(value.name for value in graph.output)
        for node in graph.node:
            if node.op_type in ("Clip", "Relu") and chosen(node):
                source, result = node.input[0], node.output[0]
                if readers[source] == 1 and source in found and result in found:
                    found[source] = _checked(found[result], result)
            elif node.op_type == "Softmax" and chosen(node):
                found[node.output[0]] = _unit_range(found.get(node.output[0]))
    return found


def _checked(value: Any, name: str) -> TensorData:
    if not isinstance(value, TensorData):
        raise TypeError(f"Unexpected type {type(value)} for {name!r}.")
    return value


def _unit_range(seen: TensorData | None) -> TensorData:
    """Return the range from 0 to 1, with the other statistics that were observed."""
    kept: dict[str, Any] = {
        name: getattr(seen, name) for name in _BESIDE_RANGE if hasattr(seen, name)
    }
    dtype = getattr(getattr(seen, "lowest", None), "dtype", np.dtype(np.float32)).type
    return TensorData(lowest=dtype(0.0), highest=dtype(1.0), **kept)
