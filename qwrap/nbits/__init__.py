"""Weights in blocks of n-bit codes: onnxruntime's MatMulNBits, GatherBlockQuantized, blocked QDQ."""
