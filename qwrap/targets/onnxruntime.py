"""onnxruntime on CPUs."""

from __future__ import annotations

from qwrap.targets.target import Kernel, Target

MOVING = frozenset({
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "Identity",
    "MaxPool",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
})
"""Operators that only move values, of which every runtime passes codes on."""

MATRIX = frozenset({"Conv", "Gemm", "MatMul"})

# Measured with onnxruntime 1.31 on fused graphs (SessionOptions.optimized_model_filepath);
# tests/quant/placement/test_target.py holds every row against the installed onnxruntime.
# Any type runs, in float between pairs where there is no kernel. What is quick was measured on
# x86-64 with VNNI: of uint8 by int8 a network takes 0.3 to 0.6 of the time in float32, of uint8 by
# uint8 0.9 to 1.3, of int8 by int8 0.8 to 2.9. Weights of 5 to 7 bits are stored in 8.
ORT_CPU = Target(
    name="onnxruntime",
    matrix=MATRIX,
    elementwise=frozenset({
        "Add",
        "AveragePool",
        "Concat",
        "GlobalAveragePool",
        "LeakyRelu",
        "Mul",
        "Sigmoid",
        "Softmax",
        "Where",
    }),
    moving=MOVING,
    absorbed=frozenset({"Relu", "Clip"}),
    dictated=frozenset({"Softmax"}),
    float_output=frozenset({"Gemm", "MatMul"}),
    lookup=frozenset({"Gather"}),
    least_table=2**14,
    quick=(
        Kernel(
            operators=MATRIX,
            activations=frozenset({"uint8"}),
            weights=frozenset({"int5", "int6", "int7", "int8"}),
        ),
        Kernel(activations=frozenset({"int8", "uint8"})),
    ),
)
