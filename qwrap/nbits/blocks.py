"""A matrix as n-bit codes with a scale for each block of inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How weights become codes.

    Attributes:
        bits: 2, 3, 4 or 8.
        block_size: inputs that share a scale; a power of two of at least 16, or 0 for one block
            per output.
        symmetric: whether 0.0 has the middle code, ``2**(bits - 1)``, and no zero points are kept.
    """

    bits: int = 4
    block_size: int = 128
    symmetric: bool = False

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes in a file: 4 for 3, which no operator of onnxruntime reads."""
        return 4 if self.bits == 3 else self.bits

    @property
    def text(self) -> str:
        """How to call the bits in a report."""
        stored = self.stored_bits
        return f"{self.bits} bits" + (f" stored in {stored}" if stored != self.bits else "")


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

    def stored(self) -> Blocks:
        """Return the same numbers as codes of as many bits as a file has for them.

        Codes without zero points move so that the middle code of the wider type means 0.
        """
        bits, wider = self.format.bits, self.format.stored_bits
        if bits == wider:
            return self
        shift = 2 ** (wider - 1) - 2 ** (bits - 1) if self.zero_point is None else 0
        form = replace(self.format, bits=wider)
        return replace(self, codes=self.codes + shift, format=form)
