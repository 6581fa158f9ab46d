"""One model quantized with onnxruntime's tool or with the drop-in, and how far it is from float."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from one_operator import Batch, Made, make_batches, make_model, run, sqnr
from onnx import ModelProto
from operator_cases import Case
from ort_script import INCUMBENT, OWN, Setting, quantize

__all__ = ["INCUMBENT", "OWN", "Setting", "Side", "make_side"]


class Side:
    """A float model in a file, quantized by either module.

    Attributes:
        made: the model and its batches.
        folder: where files go.
    """

    def __init__(self, made: Made, folder: Path) -> None:
        self.made, self.folder = made, folder
        self.source = folder / "float.onnx"
        onnx.save(made.model, self.source)

    def quantize(self, module: str, setting: Setting | None = None) -> ModelProto:
        output = self.folder / f"{module}.onnx"
        return quantize(module, self.source, self.made.batches, output, setting or Setting())

    def quality(
        self, quantized: ModelProto, batches: Sequence[Batch] = (), optimised: bool = False
    ) -> float:
        """Return the lowest SQNR over the batches, in dB."""
        return min(
            sqnr(run(self.made.model, batch), run(quantized, batch, optimised))
            for batch in batches or self.made.batches
        )

    def qualities(self, setting: Setting, optimised: bool = False) -> tuple[float, float]:
        """Return the drop-in's SQNR, and the incumbent's."""
        own, theirs = (
            self.quality(self.quantize(module, setting), optimised=optimised)
            for module in (OWN, INCUMBENT)
        )
        return own, theirs


def make_side(
    folder: Path, case: Case, opset: int = 17, half: bool = False, constants: bool = False
) -> Side:
    """Build the case's model and three batches."""
    batches = make_batches(case, half=half)
    return Side(Made(make_model(case, opset, half, constants), batches), folder)
