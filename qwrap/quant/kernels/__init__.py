"""What onnxruntime's fused integer kernels compute, in torch."""

from qwrap.quant.kernels.conv import QLinearConv, qlinear_conv
from qwrap.quant.kernels.elementwise import (
    LookUp,
    QLinearAdd,
    QLinearConcat,
    QLinearMul,
    QLinearWhere,
    pass_through,
    qlinear_add,
    qlinear_leaky_relu,
    qlinear_sigmoid,
)
from qwrap.quant.kernels.grid import Grid
from qwrap.quant.kernels.matmul import ActivationMatMul, QLinearMatMul, qgemm, qlinear_matmul
from qwrap.quant.kernels.pool import QLinearAveragePool, QLinearGlobalAveragePool
from qwrap.quant.kernels.softmax import QLinearSoftmax

__all__ = [
    "ActivationMatMul",
    "Grid",
    "LookUp",
    "QLinearAdd",
    "QLinearAveragePool",
    "QLinearConcat",
    "QLinearConv",
    "QLinearGlobalAveragePool",
    "QLinearMatMul",
    "QLinearMul",
    "QLinearSoftmax",
    "QLinearWhere",
    "pass_through",
    "qgemm",
    "qlinear_add",
    "qlinear_conv",
    "qlinear_leaky_relu",
    "qlinear_matmul",
    "qlinear_sigmoid",
]
