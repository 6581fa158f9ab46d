"""What ``matmul_nbits_quantizer`` is made of."""
