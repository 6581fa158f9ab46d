"""Bodies of If, Loop and Scan, quantized with what the graphs around them have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx import GraphProto, helper

from qwrap.graph import graphs
from qwrap.ort.graphs.scopes import made_names
from qwrap.ort.quant_utils import add_infer_metadata

if TYPE_CHECKING:
    from qwrap.ort.onnx_quantizer import ONNXQuantizer


def quantize_body(around: ONNXQuantizer, body: GraphProto, key: str) -> GraphProto:
    """Return a body, quantized.

    Args:
        around: quantizer of the graph whose node has the body. It gets the codes of what the
            body reads of that graph, and of constants there.
        body: is left alone.
        key: node and attribute, for messages.
    """
    wrapped = helper.make_model(
        body, producer_name="onnx-quantizer", opset_imports=around.model.model.opset_import
    )
    add_infer_metadata(wrapped)
    own = {name for graph in graphs(body) for name in made_names(graph)}
    quantizer = type(around)(
        wrapped,
        around.per_channel,
        around.reduce_range,
        around.mode,
        around.static,
        around.weight_qType,
        around.activation_qType,
        _within(around.tensors_range, own),
        around.nodes_to_quantize,
        around.nodes_to_exclude,
        around.op_types_to_quantize,
        _own_options(around.extra_options, own),
        in_place=True,
        parent=around,
    )
    quantizer.graph_scope = f"{around.graph_scope}{key}/"
    quantizer.quantize_model()
    around.report.nodes += quantizer.report.nodes
    around.report.notes += quantizer.report.notes
    graph: GraphProto = quantizer.model.graph()
    return graph


def _within(ranges: Any, names: set[str]) -> Any:
    """Return the ranges of a body's own tensors, and of those of bodies within."""
    return None if ranges is None else {name: ranges[name] for name in ranges if name in names}


def _own_options(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the options with the overrides of such tensors only."""
    overrides = options.get("TensorQuantOverrides") or {}
    own = {name: value for name, value in overrides.items() if name in names}
    return {**options, "TensorQuantOverrides": own}
