"""What each operator computes: plain torch functions, no state, no graph."""

from qwrap.ops import (
    activation,
    cast,
    conv,
    generate,
    logic,
    math,
    matmul,
    norm,
    pad,
    pool,
    recurrent,
    reduce,
    resize,
    select,
    shape,
)
from qwrap.ops.registry import Operator, find, op, operators, registered, revision

__all__ = [
    "Operator",
    "activation",
    "cast",
    "conv",
    "find",
    "generate",
    "logic",
    "math",
    "matmul",
    "norm",
    "op",
    "operators",
    "pad",
    "pool",
    "recurrent",
    "reduce",
    "registered",
    "resize",
    "revision",
    "select",
    "shape",
]
