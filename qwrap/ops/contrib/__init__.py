"""com.microsoft: the operators that onnxruntime's optimizers and quantizers write."""

from qwrap.ops.contrib import (
    activation,
    attention,
    blockwise,
    conv,
    decoder,
    gqa,
    math,
    matmul,
    norm,
    packed,
    position,
    qlinear,
    qproduct,
    rotary,
    shape,
)

__all__ = [
    "activation",
    "attention",
    "blockwise",
    "conv",
    "decoder",
    "gqa",
    "math",
    "matmul",
    "norm",
    "packed",
    "position",
    "qlinear",
    "qproduct",
    "rotary",
    "shape",
]
