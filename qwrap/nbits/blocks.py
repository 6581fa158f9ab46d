"""A matrix as n-bit codes with a scale for each block of inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How weights become codes.

    Attributes:
        bits: 2, 4 or 8.
        block_size: inputs that share a scale; a power of two of at least 16, or 0 for one block
            per output.
        symmetric: whether 0.0 has the middle code, ``2**(bits - 1)``, and no zero points are kept.
    """

    bits: int = 4
    block_size: int = 128
    symmetric: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes of a matrix ``[N, K]`` (outputs, inputs); a weight is ``(code - zero_point) * scale``.

    Attributes:
        codes: uint8 ``[N, K]``, from 0 to ``2**bits - 1``.
        scale: ``[N, ceil(K / block_size)]``, in the dtype of the weight.
        zero_point: uint8 or (HQQ) float, of the shape of ``scale``; None for the middle code.
        format: bits and block size.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: BlockFormat
