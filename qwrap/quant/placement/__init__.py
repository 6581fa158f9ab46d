"""Where quantization sits."""
