"""The text of values in generated code, and the code of one Block as it grows."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from qwrap.errors import UnsupportedOpError
from qwrap.model.expressions import access, comment, literal
from qwrap.model.layout import Layout
from qwrap.model.points import Point, Program, ValuePoint
from qwrap.model.scopes import Region
from qwrap.model.substitute import Substitute
from qwrap.model.tensors import to_torch
from qwrap.ops.element_types import TORCH_DTYPES

DEEPEST_LOOPS = 20  # more are a SyntaxError: CO_MAXBLOCKS in CPython's frame
TAKEN_NAMES = frozenset((*dir(builtins), "self", "device", "run", "_"))


def as_tensor(value: Any, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """Turn a host value into the tensor that ONNX sees."""
    if dtype is None:
        first = value[:1] if isinstance(value, list) else [value]
        dtype = torch.bool if first and isinstance(first[0], bool) else torch.int64
    if device.type == "cpu":
        return torch.tensor(value, dtype=dtype, device=device)
    # Filled where they are, for a copy from the host would wait for the device.
    if not isinstance(value, list):
        return torch.full((), value, dtype=dtype, device=device)
    numbers = [torch.full((1,), n, dtype=dtype, device=device) for n in value]
    return torch.cat(numbers) if numbers else torch.empty(0, dtype=dtype, device=device)


@dataclass(slots=True)
class Writer:
    """The code of one Block while it is written.

    Attributes:
        layout: what is to run.
        program: what sits on its points.
        attached: point -> name of the module attached there.
        region: the nodes of the Block.
        replaced: node key -> its substitute, and the name of that in the Block.
        lines: what is written so far.
        namespace: the names it uses.
        buffers: attribute name -> constant tensor, not part of the ``state_dict``.
        needs_device: whether the code creates tensors.
        depth: how far lines are indented.
        loops: the nodes whose loops the next line is inside of.
    """

    layout: Layout
    program: Program
    attached: Mapping[Point, str]
    region: Region
    replaced: Mapping[str, tuple[str, Substitute]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    namespace: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    needs_device: bool = False
    depth: int = 1
    loops: list[str] = field(default_factory=list)

    # --- statements --------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Write one statement."""
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Write ``header`` and indent what is written inside the ``with`` block."""
        self.line(header)
        self.depth += 1
        yield
        self.depth -= 1

    @contextmanager
    def loop(self, header: str, node: ir.Node) -> Iterator[None]:
        """Write the header of a loop of ``node`` and indent what is written inside."""
        self.loops.append(self.layout.graph.node_key(node))
        if len(self.loops) > DEEPEST_LOOPS:
            raise UnsupportedOpError(
                f"node {self.loops[-1]!r}: {node.op_type} inside of {len(self.loops) - 1} loops, "
                f"{self.loops[0]!r} the outermost; Python nests {DEEPEST_LOOPS}"
            )
        with self.block(f"{header}{comment(self.loops[-1])}"):
            yield
        self.loops.pop()

    def assign(self, targets: Iterable[str], values: Iterable[str]) -> None:
        """Assign all ``values`` to ``targets`` at once."""
        pairs = list(zip(targets, values, strict=True))
        if pairs:
            self.line(f"{', '.join(t for t, _ in pairs)} = {', '.join(v for _, v in pairs)}")

    def free(self, keys: Iterable[str]) -> None:
        """Delete the locals of values that nothing reads any more."""
        names = [self.local(key) for key in keys]
        if names:
            self.line(f"del {', '.join(names)}")

    def finish_value(self, key: str) -> None:
        """Pass a value that was just made through what sits on it."""
        name = self.local(key)
        tap = self.program.taps.get(ValuePoint(key))
        if tap is not None:
            self.line(f"{name} = {self.tap(ValuePoint(key), tap)}({name})")
        watcher = self.program.watchers.get(key)
        if watcher is not None:
            self.namespace[f"watch_{name}"] = watcher
            self.line(f"watch_{name}({name})")

    # --- names -------------------------------------------------------------------------------

    def local(self, key: str) -> str:
        """Return the local variable of a value."""
        return f"v{self.layout.numbers[key]}"

    def tap(self, point: Point, tap: Callable[..., Any]) -> str:
        """Return the text of what sits on ``point``."""
        if point in self.attached and isinstance(tap, torch.nn.Module):
            return f"self.taps[{self.attached[point]!r}]"
        return self.bind("tap", tap)

    def substitute(self, node: str) -> str:
        """Return the text of the substitute for a node."""
        return f"self.substitutes[{self.replaced[node][0]!r}]"

    def bind(self, what: str, thing: object) -> str:
        """Return a new name for an object."""
        name = f"{what}_{len(self.namespace)}"
        self.namespace[name] = thing
        return name

    def function(self, function: Callable[..., Any]) -> str:
        """Return the name of a function, its own if that is free."""
        name = getattr(function, "__name__", type(function).__name__)
        while (
            keyword.iskeyword(name)
            or name in TAKEN_NAMES
            or self.namespace.setdefault(name, function) is not function
        ):
            name += "_"
        return name

    # --- values ------------------------------------------------------------------------------

    def number(self, value: ir.Value) -> str:
        """Return the text of a value as Python numbers."""
        key = self.layout.graph.key(value)
        values = self.layout.values
        if key in values.constants:
            return literal(values.constants[key].tolist())
        return self.local(key) if key in values.hosts else f"{self.tensor(value)}.tolist()"

    def scalar(self, value: ir.Value, kind: str) -> str:
        """Return the text of a value of one element as ``kind``, ``"bool"`` or ``"int"``."""
        key = self.layout.graph.key(value)
        known = self.layout.values.small_constant(value)
        if known is not None:
            return literal({"bool": bool, "int": int}[kind](known.item()))
        host = self.layout.values.hosts.get(key)
        if host is None:
            return f"{kind}({self.tensor(value)})"
        return self.local(key) + ("[0]" if host.is_list else "")

    def tensor(self, value: ir.Value) -> str:
        """Return the text of a value as a tensor (or list, or None, as it travels)."""
        key = self.layout.graph.key(value)
        values = self.layout.values
        if key in values.hosts:
            self.namespace["as_tensor"] = as_tensor
            self.needs_device = True
            return f"as_tensor({self.local(key)}, {self.dtype(value)}, device)"
        if key in values.constants:
            name = f"_constant_{self.layout.numbers[key]}"
            self.buffers[name] = to_torch(ir.tensor(values.constants[key]))
            return f"self.{name}"
        if key in values.texts:
            name = f"text_{self.layout.numbers[key]}"
            self.namespace[name] = values.texts[key]
            return name
        slot = self.layout.slots.get(key)
        if slot is not None and slot.path[: len(self.region.path)] == self.region.path:
            return access("self", (*slot.path[len(self.region.path) :], slot.name))
        return self.local(key)

    def dtype(self, value: ir.Value) -> str:
        """Return the name of the element type of a value, None where inference did not find it."""
        known = self.layout.graph.type_of(value).dtype
        dtype = TORCH_DTYPES.get(known or ir.DataType.UNDEFINED)
        if dtype is None:
            return "None"
        if known == ir.DataType.FLOAT:
            dtype = self.layout.settings.dtype or dtype
        name = str(dtype).replace("torch.", "dtype_")
        self.namespace[name] = dtype
        return name
