"""com.microsoft: the operators that onnxruntime's optimizers and quantizers write."""

from qwrap.ops.contrib import (
    activation,
    conv,
    math,
    matmul,
    norm,
    shape,
)

__all__ = [
    "activation",
    "conv",
    "math",
    "matmul",
    "norm",
    "shape",
]
