"""What onnxruntime's tool took over from Neural Compressor."""

from qwrap.ort.neural_compressor.weight_only import gptq_quantize, rtn_quantize

__all__ = ["gptq_quantize", "rtn_quantize"]
