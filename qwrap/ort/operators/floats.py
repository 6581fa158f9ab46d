"""Inputs and outputs of float kernels in a float16 graph, which know float32 only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto

from qwrap.ort.qoperator.code_inputs import cast_node

if TYPE_CHECKING:
    from qwrap.ort.onnx_quantizer import ONNXQuantizer


def float32_inputs(quantizer: ONNXQuantizer, names: list[str]) -> list[str]:
    """Append casts of float16 tensors, and return the names of all as float32."""
    return [_wide(quantizer, name) if name else "" for name in names]


def _wide(quantizer: ONNXQuantizer, name: str) -> str:
    quantizer.read_float(name)
    if not quantizer.types.is_half(name):
        return name
    made = quantizer.free_name(f"{name}_float32")
    quantizer.add_new_nodes([cast_node(name, made, TensorProto.FLOAT)])
    return made


def float32_outputs(
    quantizer: ONNXQuantizer, names: list[str]
) -> tuple[list[str], list[NodeProto]]:
    """Return names of float32 outputs, and casts from them where the graph wants float16."""
    made, casts = [], []
    for name in names:
        half = bool(name) and quantizer.types.is_half(name)
        made.append(quantizer.free_name(f"{name}_float32") if half else name)
        if half:
            casts.append(cast_node(made[-1], name, TensorProto.FLOAT16))
    return made, casts
