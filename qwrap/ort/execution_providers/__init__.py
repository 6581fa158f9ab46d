"""What single execution providers of onnxruntime ask for."""
