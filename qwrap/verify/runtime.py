"""A QDQ file in onnxruntime, giving away the codes of its tensors beside its outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qwrap.errors import InputError
from qwrap.verify.qdq_file import QdqFile, QuantizedTensor
from qwrap.verify.session import Array, Mode


class Runtime:
    """One mode of onnxruntime on one file.

    Codes come from a copy of the file that returns them. As written, that copy computes what the
    file does; with optimisations it should, so the outputs come from the file itself and those of
    the copy are held against them.

    Attributes:
        mode: how onnxruntime runs the file.
        disturbed: whether the copy ever gave other outputs than the file.
        unfused: whether onnxruntime opens the file only without integer kernels.
    """

    def __init__(self, file: QdqFile, mode: Mode, tensors: tuple[QuantizedTensor, ...]) -> None:
        """Open the sessions.

        Raises:
            ModelError: onnxruntime refuses the file.
        """
        self.mode = mode
        self.disturbed = False
        self._outputs = file.outputs
        self._codes = [tensor.returned for tensor in tensors]
        self._copy = file.session_with_codes(mode, tensors) if tensors else None
        both = self._copy is None or mode is Mode.OPTIMISED
        self._file = file.session(mode) if both else None
        self.unfused = self._file is not None and self._file.unfused

    def run(self, feed: Mapping[str, Array]) -> tuple[dict[str, Tensor], dict[str, Array]]:
        """Return the graph outputs and the codes, both by name.

        Raises:
            InputError: onnxruntime cannot run the file on these inputs.
        """
        arrays, codes = {}, {}
        if self._copy is not None:
            codes = self._copy.run(list(dict.fromkeys([*self._outputs, *self._codes])), feed)
            arrays = {name: codes[name] for name in self._outputs}
        if self._file is not None:
            arrays = self._file.run(self._outputs, feed)
            if self._copy is not None:
                self.disturbed |= any(not _equal(arrays[n], codes[n]) for n in self._outputs)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, codes


def to_feed(inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return inputs as onnxruntime takes them.

    Raises:
        InputError: numpy has no such type.
    """
    try:
        return {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
    except TypeError as error:
        raise InputError(
            f"onnxruntime takes no inputs of this type from Python: {error}"
        ) from error


def _equal(first: Array, second: Array) -> bool:
    floats = np.issubdtype(first.dtype, np.floating)
    return np.array_equal(first, second, equal_nan=bool(floats))
