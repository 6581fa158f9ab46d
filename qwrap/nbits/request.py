"""What one node's weight is to become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as ir

from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.methods import Method

Form = Literal["operator", "qdq", "fp4", "nf4"]


@dataclass(frozen=True, slots=True)
class Naming:
    """Names of what replaces a weight ``{w}``; ``{bits}`` and ``{block}`` are known too.

    Attributes:
        codes: of the packed codes.
        scale: of the scales.
        zero_point: of the zero points.
        node: what follows the name of the node.
    """

    codes: str = "{w}_Q{bits}"
    scale: str = "{w}_scales"
    zero_point: str = "{w}_zero_points"
    node: str = "_Q{bits}"


OPERATOR_NAMES = Naming()
PAIR_NAMES = Naming("{w}_DQ_Q{bits}", "{w}_DQ_scales", "{w}_DQ_zero_points", "_DQ_Q{bits}")
COMPRESSOR_NAMES = Naming("{w}_Q{bits}G{block}", "{w}_scale", "{w}_zp", "_Q{bits}")
"""Those of the methods that onnxruntime took over from Neural Compressor."""


@dataclass(frozen=True, slots=True)
class Request:
    """How one node is quantized.

    Attributes:
        format: bits, block size, symmetry.
        method: makes the codes.
        form: one operator that takes integer codes, DequantizeLinear before the float operator, or
            MatMulBnb4, which takes 4-bit floats and needs no method.
        accuracy_level: in which type MatMulNBits multiplies; 0 leaves it to the runtime.
        axis: along which the blocks of a Gather's table lie.
        transposed: whether a pair keeps the codes as ``[N, K]``, with a Transpose behind.
        statistics: what the method is to know of the node's input.
        naming: None: the usual names of the form.
        learned: gives the codes, instead of the method.
        note: what there is to say of the codes, once they are made.
    """

    format: BlockFormat
    method: Method
    form: Form = "operator"
    accuracy_level: int = 0
    axis: int = 1
    transposed: bool = False
    statistics: Any = field(default=None, compare=False)
    naming: Naming | None = None
    learned: Callable[[], Blocks] | None = field(default=None, compare=False)
    note: Callable[[], str] = field(default=str, compare=False)

    def names(self, weight: str, inputs: int) -> Naming:
        """Return the names for a weight of ``inputs`` inputs."""
        usual = OPERATOR_NAMES if self.form == "operator" else PAIR_NAMES
        naming, bits = self.naming or usual, self.format.bits
        block = self.format.block_size or inputs

        def filled(text: str) -> str:
            return text.replace("{w}", weight).format(bits=bits, block=block)

        return Naming(*(filled(getattr(naming, name)) for name in Naming.__slots__))


Choose = Callable[[ir.Node], Request | None]
