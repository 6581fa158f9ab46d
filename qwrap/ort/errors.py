"""Errors of the drop-in: qwrap's, and at once those that onnxruntime's tool would raise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from qwrap.errors import ConfigError, ExportError, InputError, ModelError


class QuantizationError(ConfigError, ValueError):
    """An argument, an option or an override contradicts itself or the model."""


class InvalidModelError(ModelError, RuntimeError):
    """The model cannot be quantized as asked, or what came out of it is not a model."""


class UnknownNameError(QuantizationError):
    """A name that nothing bears; the message suggests the nearest one."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        """Say that ``what`` (such as "node to exclude") is unknown, and which name is nearest."""
        near = difflib.get_close_matches(name, list(known), n=1)
        super().__init__(f"{what} '{name}' does not exist" + (f"; '{near[0]}'?" if near else ""))


class MissingFileError(InvalidModelError, FileNotFoundError):
    """A model, or the file that its weights lie in, is not there."""


class MissingFolderError(ExportError, FileNotFoundError):
    """The folder that a file is to be written to is not there."""


class ComparisonError(InputError, RuntimeError):
    """What was collected cannot be compared, or there is none."""


class UnsupportedError(QuantizationError, AssertionError):
    """What was asked for there is not: where onnxruntime's tool asserts that it is not wanted."""


class BlockSizeError(QuantizationError, RuntimeError):
    """No kernel reads blocks of this size."""
