"""What the parts of a model cost in each choice of types."""
