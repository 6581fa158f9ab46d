"""The ranges of all tensors of a model, from and to the files of other tools."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from qwrap.config import QuantSpec
from qwrap.errors import TableError
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import Stub
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.document import at
from qwrap.quant.tables.forms import check_form, decode_table, encode_table
from qwrap.quant.tables.tensor_range import TensorRange

LIMIT = 2**30
"""Bytes of the largest file that is read; one of a large network has some hundred megabytes."""


class RangeTable(Mapping[str, TensorRange]):
    """The range of each tensor by name, and its scale where known.

    Reads and writes the files that onnxruntime, TensorRT, AIMET and QNN keep ranges in; the
    package's documentation says what each of them holds. ``qwrap.rescale(model, table)`` puts a
    table on a model.

    Attributes:
        floating: tensors that stay in floating point, and the bits of their type, where a file
            says so.
        method: the calibrator that onnxruntime's cache names; ``quantize_static`` has to be called
            with the same.
        smooth_quant: what onnxruntime's cache says of SmoothQuant.

    Example:
        >>> table = RangeTable({"x": TensorRange(-1.0, 3.0)})
        >>> float(table["x"].high)
        3.0
    """

    def __init__(
        self,
        ranges: Mapping[str, TensorRange],
        *,
        floating: Mapping[str, int] | None = None,
        method: str = "MinMax",
        smooth_quant: bool = False,
    ) -> None:
        self._ranges = dict(ranges)
        self.floating = dict(floating or {})
        self.method, self.smooth_quant = method, smooth_quant

    def __getitem__(self, name: str) -> TensorRange:
        return self._ranges[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def __repr__(self) -> str:
        return f"RangeTable of {len(self)} tensors"

    @classmethod
    def read(cls, path: str | os.PathLike[str], form: str | None = None) -> RangeTable:
        """Read a file of ranges.

        Args:
            path: the file.
            form: its form, one of ``qwrap.quant.tables.FORMS``; None to tell by its contents.

        Raises:
            TableError: it cannot be read, is broken, or is of no known form; the message names
                file and entry.
        """
        check_form(form)
        with at(os.fspath(path)):
            contents = decode_table(_load(Path(path)), form)
        return cls(
            contents.ranges,
            floating=contents.floating,
            method=contents.method,
            smooth_quant=contents.smooth_quant,
        )

    def write(self, path: str | os.PathLike[str], form: str) -> None:
        """Write the ranges to a file, all of it or nothing.

        Args:
            path: the file to make or replace.
            form: one of ``qwrap.quant.tables.FORMS``.

        Raises:
            TableError: the form cannot hold an entry, or the file cannot be written.
        """
        check_form(form)
        contents = Contents(
            ranges=self._ranges,
            floating=self.floating,
            method=self.method,
            smooth_quant=self.smooth_quant,
        )
        with at(os.fspath(path)):
            _replace(Path(path), encode_table(contents, form))

    @classmethod
    def of(cls, model: WrappedModel) -> RangeTable:
        """Return the ranges and scales of a calibrated model.

        Activations that have another tensor's scale are listed with it, what some readers of a
        tensor get in another type under the key of that conversion, and so is what goes into
        an activation function that the kernel before it absorbs, as a Relu. Weights and other
        stored constants are listed too. Biases are not, for their scales follow from those of
        input and weight, and neither is what stays in floating point: who reads the table has to
        exclude those nodes.

        Raises:
            ConfigError: the model is not prepared.
            NotCalibratedError: it is not calibrated.
            TableError: a constant has different scales in two nodes.
        """
        plan, ranges = plan_of(model), dict[str, TensorRange]()
        for key, tensor in plan.tensors.items():
            stub = model.tap(plan.point_of(tensor.source))
            assert isinstance(stub, Stub)
            ranges[key] = TensorRange.from_qparams(stub.qparams, stub.spec)
        for _, conversion in plan.conversions():
            stub = model.tap(conversion.points[0])
            assert isinstance(stub, Stub)
            ranges[conversion.key] = TensorRange.from_qparams(stub.qparams, stub.spec)
        for key, after in _absorbed(model).items():
            if after in ranges:
                ranges.setdefault(key, ranges[after])
        for (node, index), constant in plan.constants.items():
            stub = model.tap(UsePoint(node, index))
            assert isinstance(stub, Stub)
            entry = TensorRange.from_qparams(stub.qparams, stub.spec, stored=True)
            if ranges.setdefault(constant.value, entry) != entry:
                raise TableError(
                    f"constant {constant.value!r} has another scale in node {node!r} than in an "
                    "earlier one; a table holds one for each name"
                )
        return cls(ranges)

    def with_scales(self, spec: QuantSpec) -> RangeTable:
        """Return the table with a scale for each entry that has none.

        Args:
            spec: type and symmetry of the codes; axis and block size are those of the entry.
        """
        ranges = {n: e if e.scale is not None else e.with_scale(spec) for n, e in self.items()}
        return RangeTable(
            ranges, floating=self.floating, method=self.method, smooth_quant=self.smooth_quant
        )


def _absorbed(model: WrappedModel) -> dict[str, str]:
    """Return the input of each absorbed activation function -> its output, last ones first."""
    graph, found = model.graph, dict[str, str]()
    for key, node in plan_of(model).nodes.items():
        if node.role == "absorbed":
            function = graph.nodes[key]
            source = function.inputs[0]
            assert source is not None
            found[graph.key(source)] = graph.key(function.outputs[0])
    return dict(reversed(found.items()))


def _load(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise TableError(f"cannot be read: {error.strerror or error}") from error
    if len(data) > LIMIT:
        raise TableError(f"is larger than {LIMIT >> 20} MiB; that is no table of ranges")
    return data


def _replace(target: Path, data: bytes) -> None:
    """Write ``data`` beside ``target`` and let it take its place."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            draft = Path(folder) / target.name
            draft.write_bytes(data)
            os.replace(draft, target)
    except OSError as error:
        raise TableError(f"cannot be written: {error.strerror or error}") from error
