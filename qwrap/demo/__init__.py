"""The embedded example: a small digit classifier and the images it was trained on."""

from qwrap.demo.digits import Split, batches, digits, model_path

__all__ = ["Split", "batches", "digits", "model_path"]
