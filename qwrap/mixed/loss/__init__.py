"""What the parts of a model lose in each choice of types."""
