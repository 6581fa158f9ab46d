"""What shape inference takes in place of operators that onnx has no schema of.

onnx knows neither types nor shapes behind an operator of com.microsoft. Each of the table below is
replaced, in the copy that inference runs on, by a standard operator with the same type and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx

from qwrap.graph.nodes import graphs

WINDOW = ("auto_pad", "ceil_mode", "dilations", "group", "kernel_shape", "pads", "strides")
ANY_SHAPE = "Reshape"  # to what nobody knows: of the type of its input
UNKNOWN = "qwrap: a shape that nobody knows"

StandIn = tuple[str, tuple[int, ...], tuple[str, ...]]
SAME: StandIn = ("Identity", (0,), ())
POOL: StandIn = ("AveragePool", (0,), WINDOW)

STAND_INS: Mapping[str, StandIn] = MappingProxyType({
    **dict.fromkeys(
        (
            *("BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "FastGelu", "GatedAdd", "Gelu"),
            *("GroupNorm", "Inverse", "LayerNormalization", "QLinearLeakyRelu", "QLinearSigmoid"),
            *("QLinearSoftmax", "QuickGelu", "RotaryEmbedding", "ScaledSiLU"),
            *("SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization"),
            *("SkipSimplifiedLayerNormalization", "Trilu"),
        ),
        SAME,
    ),
    "DequantizeLinear": ("DequantizeLinear", (0, 1, 2), ("axis",)),
    "QuantizeLinear": ("QuantizeLinear", (0, 1, 2), ("axis",)),
    "QLinearAdd": ("Add", (0, 3), ()),
    "QLinearMul": ("Mul", (0, 3), ()),
    "QLinearWhere": ("Where", (0, 1, 4), ()),
    "FusedConv": ("Conv", (0, 1, 2), WINDOW),
    "FusedGemm": ("Gemm", (0, 1, 2), ("transA", "transB")),
    "QLinearConv": ("QLinearConv", tuple(range(9)), WINDOW),
    "QLinearAveragePool": POOL,
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), ()),
    "Attention": (ANY_SHAPE, (0,), ()),
    "DecoderMaskedMultiHeadAttention": (ANY_SHAPE, (0,), ()),
    "DynamicQuantizeLSTM": (ANY_SHAPE, (0,), ()),
    "DynamicQuantizeMatMul": (ANY_SHAPE, (0,), ()),
    "EmbedLayerNormalization": (ANY_SHAPE, (2,), ()),
    "FusedMatMul": (ANY_SHAPE, (0,), ()),
    "GatherBlockQuantized": (ANY_SHAPE, (2,), ()),
    "GroupQueryAttention": (ANY_SHAPE, (0,), ()),
    "MatMulBnb4": (ANY_SHAPE, (0,), ()),
    "MatMulIntegerToFloat": (ANY_SHAPE, (2,), ()),
    "MatMulNBits": (ANY_SHAPE, (0,), ()),
    "MultiHeadAttention": (ANY_SHAPE, (0,), ()),
    "QAttention": (ANY_SHAPE, (3,), ()),
    "QLinearConcat": (ANY_SHAPE, (1,), ()),
    "TransposeMatMul": (ANY_SHAPE, (0,), ()),
})
"""Operator to the standard one, the inputs that it takes, and the attributes."""


def put_stand_ins(proto: onnx.ModelProto) -> None:
    """Replace nodes of ``proto``, in place, by what inference knows, and add an input for them."""
    proto.graph.input.append(
        onnx.helper.make_tensor_value_info(UNKNOWN, onnx.TensorProto.INT64, [None])
    )
    versions = {"" if e.domain == "ai.onnx" else e.domain: e.version for e in proto.opset_import}
    for graph in graphs(proto.graph):
        for node in graph.node:
            stand_in = STAND_INS.get(node.op_type)
            own = node.domain == "com.microsoft" or (
                node.op_type in ("LayerNormalization", "SimplifiedLayerNormalization")
                and not onnx.defs.has(node.op_type, versions.get("", 1), node.domain)
            )
            if own and stand_in is not None:
                _replace(node, stand_in)


def _replace(node: onnx.NodeProto, stand_in: StandIn) -> None:
    op_type, indices, kept = stand_in
    attributes = {a.name: a for a in node.attribute}
    if "channels_last" in attributes and attributes.pop("channels_last").i:
        op_type, indices, kept = ANY_SHAPE, (0,), ()
    inputs = [node.input[i] for i in indices if i < len(node.input)]
    inputs += [UNKNOWN] if op_type == ANY_SHAPE else []
    del node.input[:], node.attribute[:], node.output[1:]
    node.op_type, node.domain = op_type, ""
    node.input.extend(inputs)
    node.attribute.extend(attributes[name] for name in kept if name in attributes)
