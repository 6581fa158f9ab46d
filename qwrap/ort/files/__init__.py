"""Models in files and messages: read, raised to another opset, optimized and written."""
