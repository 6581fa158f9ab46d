"""What the integer kernels of a runtime can run, as data."""

from __future__ import annotations

from dataclasses import dataclass

from qwrap.config import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The operators that a runtime fuses with the QDQ pairs around them.

    Attributes:
        matrix: operators with a quantized weight; they decide what else is worth quantizing.
        elementwise: operators with an integer kernel that needs every tensor quantized.
        moving: operators that pass codes on, where input and output have the same qparams.
        absorbed: activations that the clamp of the producer's output replaces.
        dictated: operators whose kernel is right only for the scale that their output range has.
        float_output: matrix operators that also write float, without a pair on their output.
        lookup: operators that fetch rows of a constant table.
        least_table: elements from which storing a table as codes is worth a pair behind it.
        scope: what is quantized where nothing else is said, see ``QConfig``.
    """

    name: str
    matrix: frozenset[str]
    elementwise: frozenset[str]
    moving: frozenset[str]
    absorbed: frozenset[str]
    dictated: frozenset[str]
    float_output: frozenset[str]
    lookup: frozenset[str]
    least_table: int
    scope: Scope = "faster"


# Measured with onnxruntime 1.31 on fused graphs (SessionOptions.optimized_model_filepath);
# tests/quant/test_target.py holds every row against the installed onnxruntime.
ORT_CPU = Target(
    name="onnxruntime CPU",
    matrix=frozenset({"Conv", "Gemm", "MatMul"}),
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
    moving=frozenset({
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
    }),
    absorbed=frozenset({"Relu", "Clip"}),
    dictated=frozenset({"Softmax"}),
    float_output=frozenset({"Gemm", "MatMul"}),
    lookup=frozenset({"Gather"}),
    least_table=2**14,
)
