"""The shell: ``qwrap demo``, ``inspect``, ``quantize``, ``search`` and ``verify``."""

from qwrap.cli import searching as searching  # adds its command to the app
from qwrap.cli.app import app, main

__all__ = ["app", "main"]
