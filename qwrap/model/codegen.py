"""Write the forward of every Block: a statement a node, a local a value, freed after last use."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qwrap.graph.index import bodies
from qwrap.model.host import HOST_OPERATORS
from qwrap.model.layout import Layout
from qwrap.model.points import Point, Program, UsePoint, ValuePoint
from qwrap.model.scopes import Path, Region
from qwrap.model.values import STANDARD, TORCH_DTYPES, attributes_of, tensors_to_torch
from qwrap.ops import Operator


@dataclass(slots=True)
class Code:
    """What one Block needs: its text, the names in it, and the integer tables it reads.

    Attributes:
        buffers: attribute name -> constant tensor, not part of the ``state_dict``.
    """

    path: Path
    source: str
    namespace: dict[str, Any]
    buffers: dict[str, torch.Tensor]


def generate(layout: Layout, program: Program, attached: Mapping[Point, str]) -> list[Code]:
    """Return the code of all Blocks for ``program``, the root last.

    Args:
        layout: what is to run.
        program: what sits on its points. A tap that is in ``attached`` is called as the submodule
            of that name under ``taps`` of the Block it belongs to.
        attached: point -> name of the attached module there.
    """
    done: list[Code] = []
    _Writer(layout, program, attached, layout.region, done).write()
    return done


def as_tensor(value: Any, device: torch.device) -> torch.Tensor:
    """Turn a host value into the int64 or bool tensor that ONNX sees."""
    return torch.tensor(value, device=device)


def region_nodes(region: Region, layout: Layout) -> Iterator[ir.Node]:
    """Yield the nodes of a region, those of reachable bodies included."""
    for node in region.nodes():
        yield from _and_bodies(node, layout)


def _and_bodies(node: ir.Node, layout: Layout) -> Iterator[ir.Node]:
    yield node
    if any(True for _ in bodies(node)):
        for body in layout.values.branches(node):
            for inner in layout.values.live_nodes(body):
                yield from _and_bodies(inner, layout)


@dataclass(slots=True)
class Interface:
    """The values that cross the border of a region, by key, in a fixed order."""

    inputs: list[str]
    outputs: list[str]


def interface(region: Region, layout: Layout) -> Interface:
    """Return what a region takes and gives."""
    graph, values = layout.graph, layout.values
    produced: dict[str, None] = {}
    used: dict[str, None] = {}
    inside = set()
    for node in region_nodes(region, layout):
        inside.add(node)
        for value in _reads(node, layout):
            used.setdefault(graph.key(value))
        for value in node.outputs:
            if value.name:
                produced.setdefault(graph.key(value))
    inputs = [
        key
        for key in used
        if key not in produced
        and key not in values.constants
        and not (key in layout.slots and layout.slots[key].path[: len(region.path)] == region.path)
        and (key in layout.slots or key not in values.stored)
    ]
    outputs = [
        key
        for key in produced
        if key not in values.constants and _leaves(graph.values[key], inside, layout)
    ]
    return Interface(inputs, outputs)


def _reads(node: ir.Node, layout: Layout) -> Iterator[ir.Value]:
    yield from (v for v in node.inputs if v is not None)
    if any(True for _ in bodies(node)):
        for body in layout.values.branches(node):
            yield from (v for v in body.outputs if v is not None)


def _leaves(value: ir.Value, inside: set[ir.Node], layout: Layout) -> bool:
    if value.is_graph_output() and value.graph is layout.graph.model.graph:
        return True
    return any(user not in inside for user in value.consumers() if _runs(user, layout))


def _runs(node: ir.Node, layout: Layout) -> bool:
    return any(v.name and layout.values.is_computed(v) for v in node.outputs)


@dataclass(slots=True)
class _Writer:
    layout: Layout
    program: Program
    attached: Mapping[Point, str]
    region: Region
    done: list[Code]
    lines: list[str] = field(default_factory=list)
    namespace: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    needs_device: bool = False
    depth: int = 1

    def write(self) -> bool:
        """Write this region and those inside it; return whether its Block wants a device."""
        border = interface(self.region, self.layout)
        root = not self.region.path
        if root:
            graph = self.layout.graph
            border = Interface(
                [graph.key(v) for v in graph.inputs], [graph.key(v) for v in graph.outputs]
            )
            for key in border.inputs:
                self._finish_value(key)
        last = self._last_uses(border.outputs)
        for i, item in enumerate(self.region.items):
            if isinstance(item, Region):
                self._call(item)
            else:
                self._node(item)
            dead = [self._local(key) for key, index in last.items() if index == i]
            if dead:
                self._line(f"del {', '.join(dead)}")
        outputs = [
            self._tensor(self.layout.graph.values[key]) if root else self._local(key)
            for key in border.outputs
        ]
        self._line("return " + (outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"))
        names = [self._local(key) for key in border.inputs]
        device = ["device"] if self.needs_device or root else []
        header = f"def run({', '.join(['self', *names, *device])}):\n"
        source = header + "\n".join(self.lines) + "\n"
        self.done.append(Code(self.region.path, source, self.namespace, self.buffers))
        return self.needs_device

    def _last_uses(self, kept: list[str]) -> dict[str, int]:
        """Return value key -> index of the last item that reads or makes it, if it may then go."""
        graph, values = self.layout.graph, self.layout.values
        last: dict[str, int] = {}
        for i, item in enumerate(self.region.items):
            if isinstance(item, Region):
                border = interface(item, self.layout)
                keys = [*border.inputs, *border.outputs]
            else:
                nodes = list(_and_bodies(item, self.layout))
                keys = [graph.key(v) for n in nodes for v in _reads(n, self.layout)]
                inner = {graph.key(v) for n in nodes[1:] for v in n.outputs if v.name}
                keys = [key for key in keys if key not in inner]
                keys += [graph.key(v) for v in item.outputs if v.name]
            for key in keys:
                if key not in values.constants and key not in values.stored:
                    last[key] = i
        return {key: i for key, i in last.items() if key not in kept}

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _local(self, key: str) -> str:
        return f"v{self.layout.numbers[key]}"

    def _call(self, region: Region) -> None:
        wants_device = _Writer(self.layout, self.program, self.attached, region, self.done).write()
        border = interface(region, self.layout)
        values = self.layout.graph.values
        arguments = [
            self._local(key) if key in self.layout.values.hosts else self._tensor(values[key])
            for key in border.inputs
        ]
        if wants_device:
            self.needs_device = True
            arguments.append("device=device")
        module = _access("self", region.path[len(self.region.path) :])
        targets = ", ".join(self._local(key) for key in border.outputs)
        self._line(f"{targets} = {module}({', '.join(arguments)})")

    def _node(self, node: ir.Node) -> None:
        graph, values = self.layout.graph, self.layout.values
        if node.op_type == "If" and node.domain in STANDARD:
            self._if(node)
        elif all(graph.key(v) in values.hosts for v in node.outputs if v.name):
            self._host(node)
        else:
            self._tensor_node(node)
        for value in node.outputs:
            if value.name and graph.key(value) not in values.hosts:
                self._finish_value(graph.key(value))

    def _finish_value(self, key: str) -> None:
        name = self._local(key)
        tap = self.program.taps.get(ValuePoint(key))
        if tap is not None:
            self._line(f"{name} = {self._tap(ValuePoint(key), tap)}({name})")
        watcher = self.program.watchers.get(key)
        if watcher is not None:
            self.namespace[f"watch_{name}"] = watcher
            self._line(f"watch_{name}({name})")

    def _tap(self, point: Point, tap: Callable[..., Any]) -> str:
        if point in self.attached and isinstance(tap, torch.nn.Module):
            return f'self.taps["{self.attached[point]}"]'
        name = f"tap_{len(self.namespace)}"
        self.namespace[name] = tap
        return name

    def _host(self, node: ir.Node) -> None:
        graph = self.layout.graph
        target = self._local(graph.key(node.outputs[0]))
        if node.op_type in ("Shape", "Size"):
            assert node.inputs[0] is not None
            x = self._tensor(node.inputs[0])
            attributes = attributes_of(node)
            span = f"[{attributes.get('start', '')}:{attributes.get('end', '')}]"
            what = f"list({x}.shape{'' if span == '[:]' else span})"
            self._line(f"{target} = {what if node.op_type == 'Shape' else f'{x}.numel()'}")
            return
        name = f"host_{node.op_type.lower()}"
        self.namespace[name] = HOST_OPERATORS[node.op_type].function
        arguments = ["None" if v is None else self._number(v) for v in node.inputs]
        arguments += [f"{k}={v!r}" for k, v in attributes_of(node).items()]
        self._line(f"{target} = {name}({', '.join(arguments)})")

    def _tensor_node(self, node: ir.Node) -> None:
        graph, values = self.layout.graph, self.layout.values
        key = graph.node_key(node)
        operator = values.operators[key]
        arguments = [self._argument(node, i) for i in range(len(node.inputs))]
        while arguments and arguments[-1] == "None":
            arguments.pop()
        if key in self.program.kernels:
            name = f"kernel_{len(self.namespace)}"
            self.namespace[name] = self.program.kernels[key]
        else:
            name = self._function(operator.function)
            arguments += self._keywords(node, operator)
        call = f"{name}({', '.join(arguments)})"
        comment = f"  # {key!r}"
        targets = [self._local(graph.key(v)) if v.name else "_" for v in node.outputs]
        if len(targets) > 1:
            self._line(f"{', '.join(targets)}, *_ = {call}{comment}")
        elif operator.returns_tuple and key not in self.program.kernels:
            self._line(f"{targets[0]} = {call}[0]{comment}")
        else:
            self._line(f"{targets[0]} = {call}{comment}")

    def _function(self, function: Callable[..., Any]) -> str:
        name = function.__name__
        while keyword.iskeyword(name) or self.namespace.setdefault(name, function) is not function:
            name += "_"
        return name

    def _keywords(self, node: ir.Node, operator: Operator) -> list[str]:
        parts = []
        if operator.wants_output_count:
            parts.append(f"output_count={len(node.outputs)}")
        if operator.wants_device:
            self.needs_device = True
            parts.append("device=device")
        if operator.wants_dtype:
            dtype = self.layout.graph.type_of(node.outputs[0]).dtype
            self.namespace["torch"] = torch
            parts.append(f"dtype={TORCH_DTYPES[dtype] if dtype is not None else None}")
        for name, value in operator.keywords(tensors_to_torch(attributes_of(node))).items():
            if isinstance(value, torch.Tensor):
                constant = f"constant_{len(self.namespace)}"
                self.namespace[constant] = value
                parts.append(f"{name}={constant}")
            else:
                parts.append(f"{name}={_literal(value)}")
        return parts

    def _argument(self, node: ir.Node, index: int) -> str:
        value = node.inputs[index]
        if value is None:
            return "None"
        number = self.layout.as_number(node, index)
        if number is not None:
            return _literal(number)
        graph = self.layout.graph
        if self.layout.values.operators[graph.node_key(node)].wants_host(index):
            return self._number(value)
        text = self._tensor(value)
        point = UsePoint(graph.node_key(node), index)
        tap = self.program.taps.get(point)
        return text if tap is None else f"{self._tap(point, tap)}({text})"

    def _number(self, value: ir.Value) -> str:
        """Return the text of a value as Python numbers."""
        key = self.layout.graph.key(value)
        values = self.layout.values
        if key in values.constants:
            return _literal(values.constants[key].tolist())
        return self._local(key) if key in values.hosts else f"{self._tensor(value)}.tolist()"

    def _tensor(self, value: ir.Value) -> str:
        """Return the text of a value as a tensor."""
        key = self.layout.graph.key(value)
        values = self.layout.values
        if key in values.hosts:
            self.namespace["as_tensor"] = as_tensor
            self.needs_device = True
            return f"as_tensor({self._local(key)}, device)"
        if key in values.constants:
            name = f"constant_{self.layout.numbers[key]}"
            self.buffers[name] = torch.from_numpy(np.array(values.constants[key]))
            return f"self.{name}"
        slot = self.layout.slots.get(key)
        if slot is not None and slot.path[: len(self.region.path)] == self.region.path:
            return _access("self", (*slot.path[len(self.region.path) :], slot.name))
        return self._local(key)

    def _if(self, node: ir.Node) -> None:
        condition = node.inputs[0]
        assert condition is not None
        key = self.layout.graph.node_key(node)
        branches = dict(bodies(node))
        taken = self.layout.values.taken.get(key)
        if taken is not None:
            self._body(node, branches[taken])
            return
        is_host = self.layout.graph.key(condition) in self.layout.values.hosts
        text = self._number(condition) if is_host else f"bool({self._tensor(condition)})"
        for header, name in ((f"if {text}:  # {key!r}", "then_branch"), ("else:", "else_branch")):
            self._line(header)
            self.depth += 1
            self._body(node, branches[name])
            self.depth -= 1

    def _body(self, node: ir.Node, body: ir.Graph) -> None:
        for inner in self.layout.values.live_nodes(body):
            self._node(inner)
        targets = [self._local(self.layout.graph.key(v)) for v in node.outputs]
        results = [self._tensor(v) for v in body.outputs]
        self._line(f"{', '.join(targets)} = {', '.join(results)}")


def _literal(value: Any) -> str:
    """Write a Python value as an expression, infinities and NaN included."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(v) for v in value)}]"
    if isinstance(value, float) and not np.isfinite(value):
        return f'float("{value}")'
    return repr(int(value) if isinstance(value, ir.DataType) else value)


def _access(start: str, path: Path) -> str:
    text = start
    for part in path:
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*", part) and not keyword.iskeyword(part)
        text = f"{text}.{part}" if plain else f"getattr({text}, {part!r})"
    return text
