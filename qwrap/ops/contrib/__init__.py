"""com.microsoft: the operators that onnxruntime's optimizers and quantizers write."""

from qwrap.ops.contrib import (
    activation,
    blockwise,
    conv,
    math,
    matmul,
    norm,
    qlinear,
    qproduct,
    shape,
)

__all__ = [
    "activation",
    "blockwise",
    "conv",
    "math",
    "matmul",
    "norm",
    "qlinear",
    "qproduct",
    "shape",
]
