"""Qualcomm's HTP, by way of QNN and onnxruntime's QNN execution provider."""

from __future__ import annotations

from qwrap.targets.onnxruntime import MOVING
from qwrap.targets.target import Kernel, Target

_ACTIVATIONS = frozenset({"int8", "int16", "uint8", "uint16"})
_MATRIX = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

# Sources:
# - https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html: the HTP backend runs
#   quantized models; activations of uint8 or uint16, weights of uint8 or int8, mixed by regions.
# - onnxruntime.quantization.execution_providers.qnn.quant_config (1.31), which makes such models:
#   weights per channel in Conv (axis 0) and ConvTranspose (axis 1) alone, "QNN does not support
#   per-channel MatMul"; Sigmoid of 16 bits has scale 1/65536 (uint16) or 1/32768 (int16), Tanh
#   1/32768, which are their ranges; all operators but Cast are quantized; beside activations of 16
#   bits weights stay at 8; weights of signed types are symmetric.
# - https://docs.qualcomm.com/doc/80-63442-10/topic/htp_opdef_version_history.html: activation types
#   INT8 and INT16 of Conv2d, TransposeConv2d, FullyConnected and MatMul, with 4-bit weights beside
#   activations of 16 bits since SDK 2.44; SFIXED_POINT_16 and UFIXED_POINT_16 both.
QNN = Target(
    name="qnn",
    matrix=_MATRIX,
    elementwise=frozenset({
        "Add",
        "AveragePool",
        "Concat",
        "Div",
        "GlobalAveragePool",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Max",
        "Min",
        "Mul",
        "Sigmoid",
        "Softmax",
        "Sub",
        "Tanh",
        "Where",
    }),
    moving=MOVING,
    absorbed=frozenset({"Relu", "Clip"}),
    dictated=frozenset({"Sigmoid", "Softmax", "Tanh"}),
    float_output=frozenset(),
    lookup=frozenset({"Gather"}),
    least_table=1,
    scope="all",
    kernels=(
        Kernel(
            operators=frozenset({"Conv", "ConvTranspose"}),
            activations=_ACTIVATIONS,
            weights=frozenset({"int8", "uint8"}),
        ),
        Kernel(
            operators=frozenset({"Conv"}),
            activations=frozenset({"int16", "uint16"}),
            weights=frozenset({"int4"}),
        ),
        Kernel(
            operators=frozenset({"Gemm", "MatMul"}),
            activations=_ACTIVATIONS,
            weights=frozenset({"int8", "uint8"}),
        ),
        Kernel(operators=frozenset({"MatMul"}), activations=_ACTIVATIONS),  # of two activations
        Kernel(activations=_ACTIVATIONS),
    ),
    symmetric=frozenset({"int16"}),
    symmetric_weights=frozenset({"int4", "int8"}),
    per_channel=frozenset({"Conv", "ConvTranspose"}),
    blocks=frozenset(),
    defaults=(("activation", "uint8"), ("weight", "int8")),
)
