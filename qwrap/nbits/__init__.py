"""Weights as blocks of n-bit codes: MatMulNBits, GatherBlockQuantized, blocked QDQ."""
