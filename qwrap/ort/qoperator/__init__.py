"""QOperator form and dynamic quantization: what classes of operators build on."""
