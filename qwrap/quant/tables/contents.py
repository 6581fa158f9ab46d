"""What a file of ranges holds, whatever its form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from qwrap.errors import TableError
from qwrap.quant.tables.document import at_tensor, shorten
from qwrap.quant.tables.tensor_range import TensorRange


@dataclass(slots=True, kw_only=True)
class Contents:
    """The ranges of a model's tensors, and what else some forms say.

    Attributes:
        ranges: by tensor name.
        floating: tensors that stay in floating point, and the bits of their type.
        method: how onnxruntime's calibrator chose the ranges: "MinMax", "Entropy", "Percentile"
            or "Distribution".
        smooth_quant: whether onnxruntime calibrated the model after SmoothQuant.
    """

    ranges: dict[str, TensorRange] = field(default_factory=dict)
    floating: dict[str, int] = field(default_factory=dict)
    method: str = "MinMax"
    smooth_quant: bool = False

    def add(self, name: str, entry: TensorRange | int) -> None:
        """Take in the range of a tensor, or the bits of one that stays in floating point.

        Raises:
            TableError: the name is there already.
        """
        if name in self.ranges or name in self.floating:
            raise TableError(f"tensor {shorten(name, 200)} is there twice")
        if isinstance(entry, TensorRange):
            self.ranges[name] = entry
        else:
            self.floating[name] = entry

    def activations(self) -> Iterator[tuple[str, TensorRange]]:
        """Yield what is no weight, for forms that hold activations alone, by name."""
        for name in sorted(self.ranges):
            if not self.ranges[name].stored:
                yield name, self.ranges[name]

    def refuse_floating(self, form: str) -> None:
        """Refuse a form that cannot say which tensors stay in floating point.

        Raises:
            TableError: there are some.
        """
        if self.floating:
            raise TableError(
                f"{form} cannot say that {sorted(self.floating)[:3]} stay in floating point; take "
                "them out of `floating`, or write aimet-1.0.0"
            )


def per_tensor(name: str, entry: TensorRange, form: str) -> TensorRange:
    """Return ``entry`` if it is one range.

    Raises:
        TableError: it has one for each channel or block.
    """
    with at_tensor(name):
        if entry.low.size != 1:
            raise TableError(
                f"has {entry.low.size} ranges; {form} holds one for a tensor: quantize the "
                "activation without an axis"
            )
    return entry


def one_line(names: Iterable[str], form: str) -> None:
    """Refuse names that a form of lines cannot hold.

    Raises:
        TableError: a name is empty, or holds a line break or a NUL.
    """
    for name in names:
        if not name or "\n" in name or "\0" in name:
            raise TableError(
                f"{form} has one line for a tensor and cannot hold the name {shorten(name)}"
            )
