"""What onnxruntime's transformers tools quantize with."""
