"""Weights as blocks of n-bit codes: MatMulNBits, GatherBlockQuantized, blocked QDQ."""

from qwrap.nbits.quantize_weights import quantize_weights

__all__ = ["quantize_weights"]
