"""The best choice of types within a budget."""
