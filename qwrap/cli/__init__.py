"""The shell: ``qwrap demo``, ``inspect``, ``quantize`` and ``verify``."""

from qwrap.cli.app import app, main

__all__ = ["app", "main"]
