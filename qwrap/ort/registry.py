"""Which class quantizes an operator type: four dictionaries, which users may extend.

A class is made with the quantizer and the node, and its ``quantize()`` calls back. Dictionaries are
looked into when a node is met, so an entry counts from when it is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from onnx import NodeProto

from qwrap.ort.enums import QuantizationMode

CommonOpsRegistry: dict[str, Any] = {}
"""Operator classes that both of the following have."""

IntegerOpsRegistry: dict[str, Any] = {**CommonOpsRegistry}
"""For dynamic quantization."""

QLinearOpsRegistry: dict[str, Any] = {**CommonOpsRegistry}
"""For static quantization in form QOperator."""

QDQRegistry: dict[str, Any] = {}
"""For static quantization in form QDQ."""


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
    if node.op_type in QDQRegistry:
        return QDQRegistry[node.op_type](onnx_quantizer, node)
    return import_module("qwrap.ort.operators.qdq_base_operator").QDQOperatorBase(
        onnx_quantizer, node
    )
