"""What verification found, as plain values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """The codes of one quantized tensor: onnxruntime's against the simulation's.

    Attributes:
        name: of the tensor in the float model.
        dtype: type of the codes.
        dequantized: names of the tensors that stand for it behind the DequantizeLinear.
        elements: how many codes were compared, over all batches.
        differing: how many of them differ.
        worst_step: largest difference in codes; infinite if the simulation gave NaN.
        sqnr: of the real values, in dB; infinite when they are equal.
    """

    name: str
    dtype: str
    dequantized: tuple[str, ...]
    elements: int
    differing: int
    worst_step: float
    sqnr: float

    @property
    def fraction(self) -> float:
        """Share of the codes that differ."""
        return self.differing / max(self.elements, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputReport:
    """One graph output against a reference.

    Attributes:
        name: of the graph output.
        elements: how many values were compared, over all batches.
        differing: how many of them are not equal.
        max_abs_difference: infinite if just one side is NaN or infinite.
        sqnr: in dB; infinite when equal.
        top1_agreement: share of rows with the largest value at the same index; None unless the
            output is float and, without axes of size 1 at its end, of shape ``[N, C]`` or
            ``[N, T, C]`` with C > 1, as class scores are.
    """

    name: str
    elements: int
    differing: int
    max_abs_difference: float
    sqnr: float
    top1_agreement: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedTensor:
    """A QuantizeLinear's input that was not compared, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelReport:
    """One way to run the model against one way to run the file.

    Attributes:
        name: of the level.
        simulation: what ran on this side.
        runtime: how onnxruntime ran the file.
        tensors: the quantized tensors in topological order.
        outputs: the graph outputs in order, onnxruntime's being the reference.
    """

    name: str
    simulation: str
    runtime: str
    tensors: tuple[TensorReport, ...]
    outputs: tuple[OutputReport, ...]

    @property
    def elements(self) -> int:
        """How many codes were compared."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def differing(self) -> int:
        """How many codes differ."""
        return sum(tensor.differing for tensor in self.tensors)

    @property
    def fraction(self) -> float:
        """Share of the codes that differ; where none were compared, of the output values."""
        compared = self.tensors if self.elements else self.outputs
        return sum(c.differing for c in compared) / max(sum(c.elements for c in compared), 1)

    @property
    def worst_step(self) -> float:
        """Largest difference in codes."""
        return max((tensor.worst_step for tensor in self.tensors), default=0.0)

    @property
    def first_differing(self) -> str | None:
        """The first tensor, in topological order, of which a code differs."""
        return next((tensor.name for tensor in self.tensors if tensor.differing), None)

    @property
    def sqnr(self) -> float:
        """Lowest SQNR of a graph output, in dB."""
        return lowest_sqnr(self.outputs)

    @property
    def top1_agreement(self) -> float | None:
        """Lowest top-1 agreement of a graph output, None if none has class scores."""
        return lowest_top1(self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The simulation against onnxruntime, at two levels.

    Attributes:
        specification: the training-form simulation against the file as written, node by node.
        deployed: the exact simulation against the file with all optimisations, as users run it.
        quantization: graph outputs of the file as users run it against the float model: the error
            of quantization itself, beside which that of the simulation should be small.
        skipped: what was not compared.
        notes: what a reader of the figures must know.
        batches: how many were run.
    """

    specification: LevelReport
    deployed: LevelReport
    quantization: tuple[OutputReport, ...]
    skipped: tuple[SkippedTensor, ...]
    notes: tuple[str, ...]
    batches: int

    @property
    def differing_codes(self) -> int:
        """How many codes of the deployed level differ."""
        return self.deployed.differing

    @property
    def codes(self) -> int:
        """How many codes the deployed level compared."""
        return self.deployed.elements

    @property
    def largest_steps(self) -> float:
        """Largest difference in codes at the deployed level."""
        return self.deployed.worst_step

    @property
    def sqnr(self) -> float:
        """Lowest SQNR of a graph output at the deployed level, in dB."""
        return self.deployed.sqnr

    @property
    def top1_agreement(self) -> float | None:
        """Lowest top-1 agreement of a graph output at the deployed level."""
        return self.deployed.top1_agreement

    def passed(self, *, max_differing: float = 0.0, min_sqnr: float = -math.inf) -> bool:
        """Whether the deployed level is within limits.

        Args:
            max_differing: largest share of differing codes; where no codes were compared, of
                differing output values.
            min_sqnr: lowest SQNR of a graph output, in dB.
        """
        return self.deployed.fraction <= max_differing and self.deployed.sqnr >= min_sqnr

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values; infinities become the text ``inf``."""
        return {**to_plain(self), "passed": self.passed()}

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict()`` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VerifyReport:
        """Return the report that ``to_dict`` made the values of."""
        return cls(
            specification=level_from_dict(values["specification"]),
            deployed=level_from_dict(values["deployed"]),
            quantization=tuple(output_from_dict(v) for v in values["quantization"]),
            skipped=tuple(SkippedTensor(**v) for v in values["skipped"]),
            notes=tuple(values["notes"]),
            batches=values["batches"],
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> VerifyReport:
        """Read what ``to_json`` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        from qwrap.verify.table import verify_table  # rich is slow to import

        return verify_table(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesReport:
    """A quantized file against the float file it was made of, both in onnxruntime.

    Attributes:
        quantization: graph outputs against the float file's, both with all optimisations.
        optimisation: the quantized file with all optimisations against the same file as written:
            what the integer kernels change.
        skipped: what was not compared.
        batches: how many were run.
    """

    quantization: tuple[OutputReport, ...]
    optimisation: LevelReport
    skipped: tuple[SkippedTensor, ...]
    batches: int

    @property
    def differing_codes(self) -> int:
        """How many codes of the quantized file depend on onnxruntime's optimisations."""
        return self.optimisation.differing

    @property
    def codes(self) -> int:
        """How many codes were compared."""
        return self.optimisation.elements

    @property
    def largest_steps(self) -> float:
        """Largest difference in codes that onnxruntime's optimisations make."""
        return self.optimisation.worst_step

    @property
    def sqnr(self) -> float:
        """Lowest SQNR of a graph output against the float file's, in dB."""
        return lowest_sqnr(self.quantization)

    @property
    def top1_agreement(self) -> float | None:
        """Lowest top-1 agreement of a graph output with the float file's."""
        return lowest_top1(self.quantization)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values; infinities become the text ``inf``."""
        return {**to_plain(self)}

    def __str__(self) -> str:
        from qwrap.verify.table import files_table  # rich is slow to import

        return files_table(self)


def lowest_sqnr(outputs: tuple[OutputReport, ...]) -> float:
    """Return the lowest SQNR, infinite without outputs."""
    return min((output.sqnr for output in outputs), default=math.inf)


def lowest_top1(outputs: tuple[OutputReport, ...]) -> float | None:
    """Return the lowest top-1 agreement, None if no output has one."""
    known = [o.top1_agreement for o in outputs if o.top1_agreement is not None]
    return min(known, default=None)


def to_plain(value: Any) -> Any:
    """Return reports, with their properties, as dicts, lists, numbers and texts."""
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if not hasattr(value, "__dataclass_fields__"):
        return value
    names = [f.name for f in fields(value)]
    names += [n for n, member in vars(type(value)).items() if isinstance(member, property)]
    return {name: to_plain(getattr(value, name)) for name in names}


def level_from_dict(values: Mapping[str, Any]) -> LevelReport:
    """Return the level that ``to_plain`` made the values of."""
    tensors = (
        {**_stored(TensorReport, v), "dequantized": tuple(v["dequantized"])}
        for v in values["tensors"]
    )
    return LevelReport(
        **{key: values[key] for key in ("name", "simulation", "runtime")},
        tensors=tuple(TensorReport(**_numbers(v, "worst_step", "sqnr")) for v in tensors),
        outputs=tuple(output_from_dict(v) for v in values["outputs"]),
    )


def output_from_dict(values: Mapping[str, Any]) -> OutputReport:
    """Return the output that ``to_plain`` made the values of."""
    return OutputReport(**_numbers(_stored(OutputReport, values), "max_abs_difference", "sqnr"))


def _stored(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in fields(kind)}


def _numbers(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**values, **{name: float(values[name]) for name in names}}
