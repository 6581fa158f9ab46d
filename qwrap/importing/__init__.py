"""Quantized files: their pairs become stubs that train on, and go back to where they came from."""
