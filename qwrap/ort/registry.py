"""Which class quantizes an operator type: four dictionaries, which users may extend.

A class is made with the quantizer and the node, and its ``quantize()`` calls back. Dictionaries are
looked into when a node is met, so an entry counts from when it is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from onnx import NodeProto

from qwrap.ort.enums import QuantizationMode
from qwrap.ort.operators.activation import QDQRemovableActivation, QLinearActivation
from qwrap.ort.operators.argmax import QArgMax
from qwrap.ort.operators.attention import AttentionQuant
from qwrap.ort.operators.binary_op import QLinearBinaryOp
from qwrap.ort.operators.concat import QLinearConcat
from qwrap.ort.operators.conv import ConvInteger, QDQConv, QLinearConv
from qwrap.ort.operators.direct_q8 import Direct8BitOp, QDQDirect8BitOp
from qwrap.ort.operators.embed_layernorm import EmbedLayerNormalizationQuant
from qwrap.ort.operators.fused_attention import QDQAttention
from qwrap.ort.operators.gather import GatherQuant, QDQGather
from qwrap.ort.operators.gavgpool import QGlobalAveragePool
from qwrap.ort.operators.gemm import QDQGemm, QLinearGemm
from qwrap.ort.operators.lstm import LSTMQuant
from qwrap.ort.operators.matmul import MatMulInteger, QDQMatMul, QLinearMatMul
from qwrap.ort.operators.maxpool import QDQMaxPool, QMaxPool
from qwrap.ort.operators.norm import QDQNormalization
from qwrap.ort.operators.pad import QDQPad, QPad
from qwrap.ort.operators.pooling import QLinearPool
from qwrap.ort.operators.qdq_base_operator import QDQOperatorBase
from qwrap.ort.operators.recurrent import QDQRecurrent
from qwrap.ort.operators.resize import QDQResize, QResize
from qwrap.ort.operators.softmax import QLinearSoftmax
from qwrap.ort.operators.split import QDQSplit, QSplit
from qwrap.ort.operators.where import QDQWhere, QLinearWhere

CommonOpsRegistry: dict[str, Any] = {
    "Gather": GatherQuant,
    "Transpose": Direct8BitOp,
    "EmbedLayerNormalization": EmbedLayerNormalizationQuant,
}
"""Operator classes that both of the following have."""

IntegerOpsRegistry: dict[str, Any] = {
    "Conv": ConvInteger,
    "MatMul": MatMulInteger,
    "Attention": AttentionQuant,
    "LSTM": LSTMQuant,
    **CommonOpsRegistry,
}
"""For dynamic quantization."""

QLinearOpsRegistry: dict[str, Any] = {
    "ArgMax": QArgMax,
    "Conv": QLinearConv,
    "Gemm": QLinearGemm,
    "MatMul": QLinearMatMul,
    "Add": QLinearBinaryOp,
    "Mul": QLinearBinaryOp,
    "Relu": QLinearActivation,
    "Clip": QLinearActivation,
    "LeakyRelu": QLinearActivation,
    "Sigmoid": QLinearActivation,
    "MaxPool": QMaxPool,
    "GlobalAveragePool": QGlobalAveragePool,
    "Split": QSplit,
    "Pad": QPad,
    "Reshape": Direct8BitOp,
    "Squeeze": Direct8BitOp,
    "Unsqueeze": Direct8BitOp,
    "Flatten": Direct8BitOp,
    "Resize": QResize,
    "AveragePool": QLinearPool,
    "Concat": QLinearConcat,
    "Softmax": QLinearSoftmax,
    "Where": QLinearWhere,
    **CommonOpsRegistry,
}
"""For static quantization in form QOperator."""

QDQRegistry: dict[str, Any] = {
    "Conv": QDQConv,
    "ConvTranspose": QDQConv,
    "Gemm": QDQGemm,
    "Clip": QDQRemovableActivation,
    "Relu": QDQRemovableActivation,
    "Reshape": QDQDirect8BitOp,
    "Transpose": QDQDirect8BitOp,
    "Squeeze": QDQDirect8BitOp,
    "Unsqueeze": QDQDirect8BitOp,
    "Flatten": QDQDirect8BitOp,
    "Resize": QDQResize,
    "MaxPool": QDQMaxPool,
    "AveragePool": QDQDirect8BitOp,
    "Slice": QDQDirect8BitOp,
    "Pad": QDQPad,
    "MatMul": QDQMatMul,
    "Split": QDQSplit,
    "Gather": QDQGather,
    "GatherElements": QDQGather,
    "Where": QDQWhere,
    "InstanceNormalization": QDQNormalization,
    "LayerNormalization": QDQNormalization,
    "BatchNormalization": QDQNormalization,
    "TopK": QDQDirect8BitOp,
    "CumSum": QDQOperatorBase,
}
"""For static quantization in form QDQ; its keys are among the types quantized by default."""

_WHEN_NAMED: dict[str, Any] = {
    "LSTM": QDQRecurrent,
    "GRU": QDQRecurrent,
    "RNN": QDQRecurrent,
    "Attention": QDQAttention,
    "MultiHeadAttention": QDQAttention,
    "GroupQueryAttention": QDQAttention,
}
"""For types of form QDQ that are quantized only where the user names them."""

CONTRIB_TYPES = frozenset({"Attention", "EmbedLayerNormalization"})
"""Operators of ``com.microsoft`` that the classes here quantize; the others are ONNX's."""

BUILT_IN_TYPES = frozenset({**IntegerOpsRegistry, **QLinearOpsRegistry})
"""Operators that the classes here quantize, whatever users add."""


def CreateDefaultOpQuantizer(onnx_quantizer: Any, node: NodeProto) -> Any:
    """Return what leaves a node float, in forms of quantized operators."""
    return import_module("qwrap.ort.operators.base_operator").QuantOperatorBase(
        onnx_quantizer, node
    )


def CreateOpQuantizer(onnx_quantizer: Any, node: NodeProto) -> Any:
    """Return what makes a quantized operator of a node, or leaves it float."""
    integer = onnx_quantizer.mode == QuantizationMode.IntegerOps
    registry = IntegerOpsRegistry if integer else QLinearOpsRegistry
    if node.op_type in registry:
        quantizer = registry[node.op_type](onnx_quantizer, node)
        if quantizer.should_quantize():
            return quantizer
    return CreateDefaultOpQuantizer(onnx_quantizer, node)


def CreateQDQQuantizer(onnx_quantizer: Any, node: NodeProto) -> Any:
    """Return what puts pairs around a node; for any operator type there is one."""
    known = QDQRegistry if node.op_type in QDQRegistry else _WHEN_NAMED
    return known.get(node.op_type, QDQOperatorBase)(onnx_quantizer, node)
