"""What the module tree looks like before any code exists: regions, and a place for each tensor."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import onnx
import onnx_ir as ir

from qwrap.graph.expand import FUNCTION
from qwrap.graph.index import OnnxGraph, ValueType, bodies
from qwrap.graph.nodes import STANDARD
from qwrap.model.points import OutputPoint, Point, UsePoint, ValuePoint
from qwrap.model.scopes import Path, Region, attribute_path, plan_regions
from qwrap.model.settings import LoadSettings
from qwrap.model.values import Values, is_flow

RUNNING_STATISTICS = ("input_mean", "input_var", "mean", "var")  # of BatchNormalization
SCALES = ("x_scale", "y_scale")  # of DequantizeLinear and QuantizeLinear
DOTTED = re.compile(r"[A-Za-z_0-9]+(\.[A-Za-z_0-9]+)*")
WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a stored tensor lives: attribute ``name`` of the module at ``path``."""

    path: Path
    name: str
    trainable: bool

    @property
    def key(self) -> str:
        """The ``state_dict`` key."""
        return ".".join((*self.path, self.name))


class Layout:
    """Regions and slots of one graph; computed from the graph alone, so always the same.

    A float tensor of rank 1 or more is a parameter; any other stored tensor is a buffer (0-d
    parameters cannot be sharded by FSDP2), and so are mean and variance of BatchNormalization,
    scales of QuantizeLinear and DequantizeLinear, whose gradients are as large as the codes,
    constants in the bodies of functions, of which the file has one for all calls, and single
    numbers without a dotted name that multiply or divide: exporters write 1 / sqrt(d) so.
    Constants that only steer shapes or bounds are written into the code as numbers.

    With ``parameters`` among the settings the rule is another: a float tensor whose initialiser's
    name fits one of these patterns is a parameter, whatever its rank, and any other a buffer.

    Attributes:
        settings: what the model was loaded with.
        slots: value key of a stored tensor -> where it lives in the module tree.
        numbers: value key -> number that names its local variable in generated code.
        homes: every node that runs -> the path of the Block whose code runs it.
    """

    def __init__(self, graph: OnnxGraph, settings: LoadSettings) -> None:
        self.graph, self.settings = graph, settings
        patterns = settings.parameters or ()
        self._named, self._wild = frozenset(patterns), wild(patterns)
        self.values = Values(graph, settings)
        self.region = plan_regions(self.values)
        self.numbers = {key: i for i, key in enumerate(graph.values)}
        self.slots: dict[str, Slot] = {}
        self._taken: set[str] = set()
        self._prefixes: set[str] = {".".join(p) for p in _paths(self.region)}
        self._numbers: dict[tuple[Path, str], Iterator[int]] = {}
        self.homes = dict(_placed_nodes(self.region, self.values))
        for node, path in self.homes.items():
            for i, value in enumerate(node.inputs):
                if value is not None:
                    self._place(node, i, value, (*path, node.op_type))
            for body in self.values.branches(node) if is_flow(node) else ():
                for value in body.outputs:
                    if graph.key(value) in self.values.stored:
                        self._add(graph.key(value), value, (*path, node.op_type), "output")
        for value in graph.outputs:
            if graph.key(value) in self.values.stored:
                self._add(graph.key(value), value, (), "output")

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self  # immutable

    def __reduce__(self) -> tuple[type[Layout], tuple[OnnxGraph, LoadSettings]]:
        return Layout, (self.graph, self.settings)

    def placed(self) -> Iterator[tuple[ir.Node, Path]]:
        """Yield every node that runs with the path of the Block whose code runs it."""
        yield from self.homes.items()

    @cached_property
    def points(self) -> dict[Point, Path]:
        """Every point that a tensor passes -> the path of the Block whose code passes it."""
        graph, values = self.graph, self.values
        points: dict[Point, Path] = {ValuePoint(graph.key(v)): () for v in graph.inputs}
        points |= {OutputPoint(index): () for index in range(len(graph.outputs))}
        for node, path in self.homes.items():
            made = [*node.outputs]
            for body in values.branches(node) if is_flow(node) else ():
                made.extend(body.inputs)
            for value in made:
                if value.name and graph.key(value) not in values.hosts:
                    points[ValuePoint(graph.key(value))] = path
            if graph.node_key(node) not in values.operators:
                continue  # shape arithmetic and control flow see no tensors
            for index, used in enumerate(node.inputs):
                if used is not None and not self.is_number(node, index):
                    points[UsePoint(graph.node_key(node), index)] = path
        return points

    def is_host_use(self, node: ir.Node, index: int) -> bool:
        """Whether input ``index`` reaches its operator as Python numbers."""
        operator = self.values.operators.get(self.graph.node_key(node))
        return operator is not None and operator.wants_host(index)

    def is_number(self, node: ir.Node, index: int) -> bool:
        """Whether input ``index`` reaches its operator as numbers, so that no tap sees it."""
        return self.is_host_use(node, index) or self.as_number(node, index) is not None

    def as_number(self, node: ir.Node, index: int) -> Any:
        """Return input ``index`` as a Python number or list if the operator wants it so, else None.

        None also where the operator would take a number but the value is not known yet.
        """
        value = node.inputs[index]
        operator = self.values.operators.get(self.graph.node_key(node))
        if value is None or operator is None:
            return None
        array = self.values.small_constant(value)
        if array is None:
            return None
        if operator.wants_host(index):
            return array.tolist()
        if index not in operator.literal or array.ndim or self._is_chosen(self.graph.key(value)):
            return None
        return array.item()

    def _is_chosen(self, key: str) -> bool:
        return key in self._named or any(fnmatchcase(key, pattern) for pattern in self._wild)

    def _place(self, node: ir.Node, index: int, value: ir.Value, path: Path) -> None:
        key = self.graph.key(value)
        if (
            key in self.values.stored
            and key not in self.slots
            and self.as_number(node, index) is None
        ):
            self._add(key, value, path, _role(node, index))

    def _add(self, key: str, value: ir.Value, path: Path, role: str) -> None:
        if key in self.slots:
            return
        trainable = self._is_trainable(value, path[-1] if path else "", role)
        name = value.name or ""
        parts = attribute_path(name.split(".")) if DOTTED.fullmatch(name) else ()
        # A name without dots says where it belongs only in a model without scopes.
        is_path = len(parts) > 1 or (len(parts) == 1 and len(path) <= 1)
        if is_path and self._free(".".join(parts)):
            path, role = parts[:-1], parts[-1]
        path, (role,) = attribute_path(path), attribute_path([role])
        slot = Slot(path, role, trainable)
        if not self._free(slot.key):  # nor is any number that was tried before
            numbers = self._numbers.setdefault((path, role), itertools.count(1))
            numbered = (Slot(path, f"{role}_{n}", trainable) for n in numbers)
            slot = next(slot for slot in numbered if self._free(slot.key))
        self.slots[key] = slot
        self._taken.add(slot.key)
        self._prefixes.update(".".join(slot.path[:n]) for n in range(1, len(slot.path) + 1))

    def _is_trainable(self, value: ir.Value, op_type: str, role: str) -> bool:
        """Whether a stored tensor is a parameter, by the rule of the class."""
        key, tensor = self.graph.key(value), self.values.stored[self.graph.key(value)]
        if not ValueType(tensor.dtype).is_float:
            return False
        if self.settings.parameters is not None:
            return self._is_chosen(key)
        producer = value.producer()
        if producer is not None and FUNCTION in producer.metadata_props:
            return False
        is_single = len(tensor.shape) == 0 or _is_scale(value, tensor.size, op_type)
        return not is_single and role not in (*RUNNING_STATISTICS, *SCALES)

    def _free(self, key: str) -> bool:
        parts = key.split(".")
        inside_tensor = any(".".join(parts[:n]) in self._taken for n in range(1, len(parts)))
        return key not in self._taken and key not in self._prefixes and not inside_tensor


def wild(patterns: Iterable[str]) -> list[str]:
    """Return those of ``patterns`` that may fit another name than their own; see ``fnmatch``."""
    return [pattern for pattern in patterns if WILD.search(pattern)]


def _is_scale(value: ir.Value, size: int, op_type: str) -> bool:
    """Whether a tensor is one number in a Mul or Div, of which no name says that it is learnt."""
    is_named = DOTTED.fullmatch(value.name or "") and "." in (value.name or "")
    return size == 1 and op_type in ("Mul", "Div") and not is_named


def _paths(region: Region) -> Iterator[Path]:
    yield region.path
    for item in region.items:
        if isinstance(item, Region):
            yield from _paths(item)


def _placed_nodes(region: Region, values: Values) -> Iterator[tuple[ir.Node, Path]]:
    """Yield every node, those of bodies included, with the path of its region."""
    for item in region.items:
        if isinstance(item, Region):
            yield from _placed_nodes(item, values)
        else:
            yield from _with_bodies(item, region.path, values)


def _with_bodies(node: ir.Node, path: Path, values: Values) -> Iterator[tuple[ir.Node, Path]]:
    yield node, path
    if any(True for _ in bodies(node)):
        for body in values.branches(node):
            for inner in values.live_nodes(body):
                yield from _with_bodies(inner, path, values)


def _role(node: ir.Node, index: int) -> str:
    """Name an unnamed parameter: weight, bias, or what the schema calls the input."""
    if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return "bias" if index == 2 else "weight"
    if node.domain in STANDARD and onnx.defs.has(node.op_type):
        inputs = onnx.defs.get_schema(node.op_type).inputs
        return inputs[min(index, len(inputs) - 1)].name.lower()
    return f"input_{index}"
