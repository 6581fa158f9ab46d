"""Watching tensors: what is kept of them, and how it is put together."""
