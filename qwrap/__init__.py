"""qwrap: quantize any ONNX model in PyTorch, exactly as onnxruntime will run it."""
