"""Sums over batches from which the figures of a report are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qwrap.errors import ModelError
from qwrap.verify.qdq_file import QuantizedTensor
from qwrap.verify.report import OutputReport, TensorReport
from qwrap.verify.session import Array


class _Noise:
    """Energy of a signal and of the difference to another, in float64."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, reference: Tensor, difference: Tensor) -> None:
        self.signal += _energy(reference)
        self.noise += _energy(difference)

    @property
    def sqnr(self) -> float:
        """Decibels: infinite without noise, minus infinite without signal or with a NaN."""
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or not math.isfinite(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


class TensorTally:
    """The codes of one tensor: onnxruntime's against those of a simulated value."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        self.tensor = tensor
        self._seen = False
        self._elements = 0
        self._differing = 0
        self._worst = 0.0
        self._noise = _Noise()

    def add(self, simulated: Tensor, codes: Array) -> None:
        """Count one batch.

        Args:
            simulated: the value in real units, any float type.
            codes: what onnxruntime's QuantizeLinear, or the function in its place, returned.

        Raises:
            ModelError: the shapes differ.
        """
        real = simulated.detach().cpu()
        value = real.to(torch.float32)
        actual = self.tensor.numbers(codes)
        _same_shape(f"tensor {self.tensor.name!r}", value, actual)
        scale, zero_point = self.tensor.along_axis(value.ndim)
        reference = self.tensor.dequantize(codes)
        # Not clamped: a value that the type cannot hold is off by as many steps. A NaN is off by
        # more than any code can be.
        position = self.tensor.position
        steps = position(value.div(scale)).add_(position(zero_point)).sub_(position(actual)).abs_()
        steps.nan_to_num_(nan=math.inf)
        # Neighbouring codes of 16 bits may be one number of 16 bits.
        steps.masked_fill_(real == reference.to(real.dtype), 0.0)
        self._seen = True
        self._elements += value.numel()
        self._differing += int(steps.count_nonzero())
        if value.numel():
            self._worst = max(self._worst, float(steps.amax()))
        self._noise.add(reference, value - reference)

    def report(self) -> TensorReport | None:
        """Return the figures so far; None if the tensor was never seen."""
        if not self._seen:
            return None
        return TensorReport(
            name=self.tensor.name,
            dtype=self.tensor.dtype,
            dequantized=self.tensor.dequantized,
            elements=self._elements,
            differing=self._differing,
            worst_step=self._worst,
            sqnr=self._noise.sqnr,
        )


class OutputTally:
    """One graph output: another version of it against a reference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._elements = 0
        self._differing = 0
        self._worst = 0.0
        self._noise = _Noise()
        self._rows = 0
        self._agreeing = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count one batch; NaN equals NaN.

        Raises:
            ModelError: the shapes differ.
        """
        _same_shape(f"output {self.name!r}", other, reference)
        scores = _scores(reference), _scores(other)
        reference, other = (t.detach().to("cpu", torch.float64) for t in (reference, other))
        same = (reference == other) | (reference.isnan() & other.isnan())
        difference = (reference - other).masked_fill_(same, 0.0).abs_().nan_to_num_(nan=math.inf)
        self._elements += reference.numel()
        self._differing += int(same.logical_not_().sum())
        if reference.numel():
            self._worst = max(self._worst, float(difference.amax()))
        self._noise.add(reference[reference.isfinite()], difference)
        if scores[0] is not None and scores[1] is not None:
            best = scores[0].argmax(-1).cpu(), scores[1].argmax(-1).cpu()
            self._rows += best[0].numel()
            self._agreeing += int((best[0] == best[1]).sum())

    def report(self) -> OutputReport:
        """Return the figures so far."""
        return OutputReport(
            name=self.name,
            elements=self._elements,
            differing=self._differing,
            max_abs_difference=self._worst,
            sqnr=self._noise.sqnr,
            top1_agreement=self._agreeing / self._rows if self._rows else None,
        )


def add_outputs(
    tallies: Iterable[OutputTally], *, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]
) -> None:
    """Count one batch of graph outputs, given by name."""
    for tally in tallies:
        tally.add(reference[tally.name], other[tally.name])


def _scores(output: Tensor) -> Tensor | None:
    """Return ``output`` with classes last if its shape is that of scores, else None.

    That is: floats of shape ``[N, C]`` or ``[N, T, C]``, C > 1, after axes of size 1 at the end
    are dropped (``[N, C, 1, 1]`` is what a classifier that ends in pooling returns).
    """
    while output.ndim > 2 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    is_scores = output.is_floating_point() and output.ndim in (2, 3) and output.shape[-1] > 1
    return output if is_scores else None


def _same_shape(what: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ModelError(
            f"{what}: shape {list(ours.shape)} here, {list(theirs.shape)} in onnxruntime; was the "
            "file exported from this model?"
        )
