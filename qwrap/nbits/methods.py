"""The ways to make codes of a matrix, by name."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from qwrap.nbits.awq import clip
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.gptq import gptq
from qwrap.nbits.hqq import hqq
from qwrap.nbits.kquant import k_quant
from qwrap.nbits.rtn import round_to_nearest


class Method(Protocol):
    """Makes codes of one matrix."""

    def __call__(self, weight: Tensor, form: BlockFormat, statistics: Any, /) -> Blocks:
        """Return codes of ``weight`` ``[N, K]``.

        Args:
            weight: float32, float16 or bfloat16.
            form: bits, block size, symmetry.
            statistics: what was seen of the K inputs, of a method that needs data; else None.
        """


METHODS: dict[str, Method] = {
    "rtn": round_to_nearest,
    "hqq": hqq,
    "k_quant": k_quant,
    "gptq": gptq,
    "awq": clip,
}
"""Rounding to nearest; half-quadratic quantization; llama.cpp's search; error compensation; ranges
fitted to the data, of weights that ``awq.rescale`` scaled first."""
FROM_DATA = {"gptq", "awq"}
"""Those that need to see the inputs of a matrix."""
