"""A prepared model, back in an ONNX file with QDQ pairs."""
