"""Quantization-aware training: what a training loop needs besides the module itself."""
