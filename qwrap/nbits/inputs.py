"""What the data shows of the inputs of the nodes that are to be quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from qwrap.graph.index import OnnxGraph
from qwrap.model.build import load
from qwrap.nbits.statistics import InputStatistics, observe


def observe_inputs(
    model: ir.Model, nodes: Iterable[ir.Node], batches: Iterable[Any]
) -> dict[ir.Node, InputStatistics]:
    """Return statistics of the first input of each node, over one pass of the data.

    Args:
        model: not modified.
        nodes: MatMul nodes of it.
        batches: as for ``qwrap.calibrate``.

    Raises:
        UnsupportedOpError: the model holds operators that qwrap does not run.
        InputError: there are no batches, one does not fit, or a value is not finite.
        ConfigError: no batch reached a node.
    """
    graph = OnnxGraph(model)
    keys = {node: graph.key(value) for node in nodes if (value := node.inputs[0]) is not None}
    seen = observe(load(model).eval(), keys.values(), batches)
    return {node: seen[key] for node, key in keys.items()}
