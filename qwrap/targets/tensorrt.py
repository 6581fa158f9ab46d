"""NVIDIA's TensorRT, which reads explicitly quantized networks."""

from __future__ import annotations

from qwrap.targets.onnxruntime import MOVING
from qwrap.targets.target import FLOAT32, Kernel, Target

_MATRIX = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
_FP8 = "float8e4m3fn"

# Sources:
# - https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
#   work-quantized-types.html: the scheme is symmetric; INT8 (signed) and FP8E4M3 for activations
#   and weights, INT4 for weights alone; scales per tensor for activations, per tensor or channel
#   for weights, in blocks for INT4.
# - …/quantized-types-explicit-quantization.html: pairs on the inputs of weighted operations, not on
#   their outputs, so that activations and residual additions fuse into them; ONNX pairs per channel
#   from opset 13 on; zero points are 0. Biases stay floats: INT32 is no quantized type.
# - https://nvidia.github.io/Model-Optimizer/reference/generated/modelopt.onnx.quantization.int8.html
#   lists the operators: the matrix ones, pools, and residual Add. That reads the pair in front of
#   the branch that goes around; with one of its own behind Conv, the two would not fuse.
TENSORRT = Target(
    name="tensorrt",
    matrix=_MATRIX,
    elementwise=_POOLS,
    moving=MOVING,
    absorbed=frozenset({"Relu", "Clip"}),
    dictated=frozenset(),
    float_output=_MATRIX | _POOLS,
    lookup=frozenset(),
    least_table=2**14,
    scope="kernels",
    kernels=(
        Kernel(operators=_MATRIX, activations=frozenset({"int8"}), weights=frozenset({"int8"})),
        Kernel(
            operators=frozenset({"Conv", "Gemm", "MatMul"}),
            activations=frozenset({_FP8}),
            weights=frozenset({_FP8}),
        ),
        Kernel(
            operators=frozenset({"Gemm", "MatMul"}),
            activations=frozenset({FLOAT32}),
            weights=frozenset({"int4", "int8", _FP8}),
        ),
        Kernel(operators=frozenset({"MatMul"}), activations=frozenset({"int8", _FP8})),  # of two
        Kernel(activations=frozenset({"int8", _FP8})),
    ),
    symmetric=frozenset({"int8"}),
    symmetric_weights=frozenset({"int4", "int8"}),
    blocks=frozenset({"int4"}),
    bias="float32",
    defaults=(("activation", "int8"), ("weight", "int8")),
)
