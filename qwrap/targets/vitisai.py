"""AMD's NPUs of Ryzen AI and Versal, by way of Vitis AI, in its form XINT8."""

from __future__ import annotations

from qwrap.targets.onnxruntime import MOVING
from qwrap.targets.target import Kernel, Target

_MATRIX = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_INT8 = frozenset({"int8"})

# Sources:
# - AMD Quark, "Power-of-Two Scales (XINT8) Quantization", github.com/amd/quark-documentation,
#   docs/onnx: "symmetric INT8 activation, weight and bias quantization with power-of-two scales".
# - https://docs.amd.com/r/en-US/ug1414-vitis-ai: strategy pof2s; one scale for each tensor, of
#   inputs, weights, biases and activations; the DPU has no floating point.
# - quark.onnx with enable_npu_cnn: activations and weights have to be symmetric, biases are of 8
#   bits (Int32Bias is False), inputs and outputs of Concat, Pad, Slice and pools have one scale
#   (AlignConcat, AlignPad, AlignSlice, AlignPool). What it further does for one compiler, limits on
#   the shift between two scales (AdjustShiftCut and the like), is not done here.
# - https://mqbench.readthedocs.io, "Vitis": 8 bits per tensor, symmetric, codes from -128 to 127;
#   Conv2d, ReLU, MaxPooling, Concat, Add, Resize, Flatten, Gemm, GlobalAveragePool.
VITISAI = Target(
    name="vitisai",
    matrix=_MATRIX,
    elementwise=frozenset({
        "Add",
        "AveragePool",
        "Concat",
        "GlobalAveragePool",
        "HardSigmoid",
        "LeakyRelu",
        "Mul",
        "Sigmoid",
        "Softmax",
        "Sub",
    }),
    moving=MOVING,
    absorbed=frozenset({"Relu", "Clip"}),
    dictated=frozenset(),
    float_output=frozenset(),
    lookup=frozenset(),
    least_table=2**14,
    scope="all",
    kernels=(
        Kernel(operators=_MATRIX, activations=_INT8, weights=_INT8),
        Kernel(operators=frozenset({"MatMul"}), activations=_INT8),  # of two activations
        Kernel(activations=_INT8),
    ),
    symmetric=_INT8,
    symmetric_weights=_INT8,
    per_channel=frozenset(),
    blocks=frozenset(),
    unified=frozenset({"AveragePool", "Concat", "GlobalAveragePool"}),
    power_of_two=True,
    bias="int8",
    defaults=(("activation", "int8"), ("weight", "int8"), ("per_channel", False)),
)
