"""What quantizing does to each operator, by the module names of onnxruntime's tool."""
