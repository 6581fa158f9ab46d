"""Ranges of tensors: what they are, how data gives them, where they are kept."""
