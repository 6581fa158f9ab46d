"""Intel's OpenVINO, which makes low-precision kernels of pairs by its own transformations."""

from __future__ import annotations

from qwrap.targets.onnxruntime import MOVING
from qwrap.targets.target import FLOAT32, Kernel, Target

_MATRIX = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ELEMENTWISE = frozenset({
    "Add",
    "AveragePool",
    "Concat",
    "Div",
    "GlobalAveragePool",
    "Max",
    "Min",
    "Mul",
    "Sub",
})
_EIGHT = frozenset({"int8", "uint8"})

# Sources:
# - https://docs.openvino.ai/2024/documentation/openvino-ir-format/
#   intermediate-representation-int8-inference.html: an operation runs in INT8 if all its inputs are
#   quantized, a Convolution if data and weights are; the CPU and GPU plugins do so.
# - https://docs.openvino.ai/2024/documentation/openvino-extensibility/openvino-plugin-library/
#   advanced-guides/low-precision-transformations.html: u8 and s8; on activations of a Convolution
#   the scale has to be per tensor; dequantization travels on through operations that move values.
# - github.com/openvinotoolkit/nncf, nncf/common/hardware/configs/cpu.json: the operators, what each
#   has on activations (8 bits per tensor, symmetric or not) and weights (8 bits per channel or
#   tensor, symmetric with level_low -128, or not), Concat with unified scales. Biases stay floats.
# - weights alone of 4 and 8 bits, in groups or not: https://docs.openvino.ai/2024/openvino-workflow/
#   model-optimization-guide/weight-compression.html
OPENVINO = Target(
    name="openvino",
    matrix=_MATRIX,
    elementwise=_ELEMENTWISE,
    moving=MOVING,
    absorbed=frozenset({"Relu", "Clip"}),
    dictated=frozenset(),
    float_output=_MATRIX | _ELEMENTWISE,
    lookup=frozenset({"Gather"}),
    least_table=2**14,
    scope="kernels",
    kernels=(
        Kernel(operators=_MATRIX, activations=_EIGHT, weights=_EIGHT),
        Kernel(
            operators=frozenset({"Gemm", "MatMul"}),
            activations=frozenset({FLOAT32}),
            weights=frozenset({"int4", "int8", "uint4", "uint8"}),
        ),
        Kernel(
            operators=frozenset({"Gather"}),
            activations=frozenset({FLOAT32, *_EIGHT}),
            weights=frozenset({FLOAT32, "int4", "int8", "uint4", "uint8"}),
        ),
        Kernel(operators=frozenset({"MatMul"}), activations=_EIGHT),  # of two activations
        Kernel(activations=_EIGHT),
    ),
    symmetric_weights=frozenset({"int4", "int8"}),
    blocks=frozenset({"int4", "uint4", "int8", "uint8"}),
    unified=frozenset({"Concat"}),
    bias="float32",
    defaults=(("activation", "uint8"), ("weight", "int8")),
)
