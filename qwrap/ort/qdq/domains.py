"""Whether QuantizeLinear and DequantizeLinear are ONNX's or onnxruntime's own, which take more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnx import TensorProto

from qwrap.ort.graphs.tensor_names import ms_domain

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph

logger = logging.getLogger(__name__)

_SINCE_21 = {TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT4, TensorProto.INT4}


def choose_for_types(quantizer: QuantizedGraph) -> None:
    """Take onnxruntime's operators, in place, where those of the opset lack a type of codes."""
    types = {quantizer.activation_qType, quantizer.weight_qType}
    types |= {t.tensor_type for t in quantizer.tensor_quant_override_qtypes}
    if types & _SINCE_21:
        _take_own([quantizer], 21, "16-bit/4-bit integer quantization types")


def choose_for_tensors(graphs: Sequence[QuantizedGraph]) -> None:
    """Take onnxruntime's operators, in place, where those of the opset lack a form of scales.

    Args:
        graphs: quantizers of a model's main graph and of the bodies in it.
    """
    chosen = [params for graph in graphs for params in graph.initializer_quant_params.values()]
    kinds = {info.data_type for graph in graphs for info in graph.tensors_to_quantize.values()}
    if any(params.get("block_size", 0) for params in chosen):
        _take_own(graphs, 21, "blocks")
    if TensorProto.FLOAT16 in kinds:
        _take_own(graphs, 19, "float16 tensors")
    if any(params.get("axis") is not None for params in chosen):
        _take_own(graphs, 13, "a scale for each channel")


def _take_own(graphs: Sequence[QuantizedGraph], since: int, what: str) -> None:
    """Take onnxruntime's operators if the opset is before ``since``, where ONNX has ``what``."""
    if graphs[0].opset_version >= since or graphs[0].qdq_op_domain:
        return
    logger.warning(
        "ONNX QuantizeLinear and DequantizeLinear operators do not support %s prior to opset %s. "
        "The domain of QuantizeLinear and DequantizeLinear operators will be set to '%s' to enable "
        "support.",
        what,
        since,
        ms_domain,
    )
    for graph in graphs:
        graph.qdq_op_domain = ms_domain
