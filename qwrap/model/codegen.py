"""Write the forward of every Block: a statement a node, a local a value, freed after last use."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from qwrap.graph.check import STANDARD
from qwrap.graph.index import bodies
from qwrap.model.border import Border, Borders, dying, makes, reads
from qwrap.model.expressions import access, comment, keyword_names, literal
from qwrap.model.host import HOST_OPERATORS, inline
from qwrap.model.layout import Layout
from qwrap.model.points import Point, Program, UsePoint, ValuePoint
from qwrap.model.scopes import Path, Region
from qwrap.model.tensors import to_torch
from qwrap.model.values import attributes_of, tensors_to_torch
from qwrap.ops import Operator
from qwrap.ops.element_types import TORCH_DTYPES


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
    _Writer(layout, Borders(layout), program, attached, layout.region, done).write()
    return done


def as_tensor(value: Any, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """Turn a host value into the tensor that ONNX sees."""
    if dtype is None:
        first = value[:1] if isinstance(value, list) else [value]
        dtype = torch.bool if first and isinstance(first[0], bool) else torch.int64
    return torch.tensor(value, dtype=dtype, device=device)


TAKEN_NAMES = frozenset((*dir(builtins), "self", "device", "run", "_"))


@dataclass(slots=True)
class _Writer:
    layout: Layout
    borders: Borders
    program: Program
    attached: Mapping[Point, str]
    region: Region
    done: list[Code]
    lines: list[str] = field(default_factory=list)
    namespace: dict[str, Any] = field(default_factory=dict)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    needs_device: bool = False
    depth: int = 1

    # --- regions and bodies ----------------------------------------------------------------------

    def write(self) -> bool:
        """Write this region and those inside it; return whether its Block wants a device."""
        border = self.borders[self.region]
        root = not self.region.path
        graph = self.layout.graph
        if root:
            inputs = tuple(graph.key(v) for v in graph.inputs)
            border = Border(inputs, tuple(graph.key(v) for v in graph.outputs))
            for key in inputs:
                self._finish_value(key)
        dead = dying(map(self.borders.touched, self.region.items), border.outputs, self.layout)
        for i, item in enumerate(self.region.items):
            if isinstance(item, Region):
                self._call(item)
            else:
                self._node(item)
            self._free(dead.get(i, ()))
        outputs = [
            self._tensor(graph.values[key]) if root else self._local(key) for key in border.outputs
        ]
        self._line("return " + (outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"))
        names = [self._local(key) for key in border.inputs]
        device = ["device"] if self.needs_device or root else []
        header = f"def run({', '.join(['self', *names, *device])}):\n"
        source = header + "\n".join(self.lines) + "\n"
        self.done.append(Code(self.region.path, source, self.namespace, self.buffers))
        return self.needs_device

    def _call(self, region: Region) -> None:
        inner = _Writer(self.layout, self.borders, self.program, self.attached, region, self.done)
        wants_device = inner.write()
        border = self.borders[region]
        values = self.layout.graph.values
        arguments = [
            self._local(key) if key in self.layout.values.hosts else self._tensor(values[key])
            for key in border.inputs
        ]
        if wants_device:
            self.needs_device = True
            arguments.append("device=device")
        module = access("self", region.path[len(self.region.path) :])
        targets = ", ".join(self._local(key) for key in border.outputs)
        call = f"{module}({', '.join(arguments)})"
        self._line(f"{targets} = {call}" if targets else call)

    def _if(self, node: ir.Node) -> None:
        (condition,) = node.inputs
        assert condition is not None
        key = self.layout.graph.node_key(node)
        branches = dict(bodies(node))
        taken = self.layout.values.taken.get(key)
        if taken is not None:
            self._body(node, branches[taken])
            return
        host = self.layout.values.hosts.get(self.layout.graph.key(condition))
        if host is None:
            text = f"bool({self._tensor(condition)})"
        else:
            text = self._number(condition) + ("[0]" if host.is_list else "")
        for header, name in (
            (f"if {text}:{comment(key)}", "then_branch"),
            ("else:", "else_branch"),
        ):
            self._line(header)
            self.depth += 1
            self._body(node, branches[name])
            self.depth -= 1

    def _body(self, node: ir.Node, body: ir.Graph) -> None:
        nodes = list(self.layout.values.live_nodes(body))
        results = [self.layout.graph.key(v) for v in body.outputs]
        made = {key for inner in nodes for key in makes(inner, self.layout)}
        touched = (
            [k for k in (*reads(inner, self.layout), *makes(inner, self.layout)) if k in made]
            for inner in nodes
        )
        dead = dying(touched, results, self.layout)
        for i, inner in enumerate(nodes):
            self._node(inner)
            self._free(dead.get(i, ()))
        pairs = [
            (self._local(self.layout.graph.key(target)), self._tensor(result))
            for target, result in zip(node.outputs, body.outputs, strict=True)
            if target.name
        ]
        if pairs:
            self._line(f"{', '.join(t for t, _ in pairs)} = {', '.join(r for _, r in pairs)}")
        else:
            self._line("pass")
        self._free(dict.fromkeys(k for k in results if k in made and self._is_tensor(k)))

    def _is_tensor(self, key: str) -> bool:
        values = self.layout.values
        return not (key in values.constants or key in values.stored or key in values.hosts)

    def _free(self, keys: Sequence[str] | Mapping[str, None]) -> None:
        if keys:
            self._line(f"del {', '.join(map(self._local, keys))}")

    # --- nodes -----------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        graph, values = self.layout.graph, self.layout.values
        if node.op_type == "If" and node.domain in STANDARD:
            self._if(node)
        elif all(key in values.hosts for key in makes(node, self.layout)):
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
            return f"self.taps[{self.attached[point]!r}]"
        name = f"tap_{len(self.namespace)}"
        self.namespace[name] = tap
        return name

    def _host(self, node: ir.Node) -> None:
        graph = self.layout.graph
        target = self._local(graph.key(node.outputs[0]))
        attributes = attributes_of(node)
        note = comment(graph.node_key(node))
        if node.op_type in ("Shape", "Size"):
            assert node.inputs[0] is not None
            x = self._tensor(node.inputs[0])
            start, end = (attributes.get(name) for name in ("start", "end"))
            span = "" if (start, end) == (None, None) else f"[{literal(start)}:{literal(end)}]"
            what = f"list({x}.shape{span})" if node.op_type == "Shape" else f"{x}.numel()"
            self._line(f"{target} = {what}{note}")
            return
        arguments = ["None" if v is None else self._number(v) for v in node.inputs]
        types = [self.layout.values.host_type(v) for v in node.inputs]
        expression = inline(node.op_type, arguments, types)
        if expression is not None:
            self._line(f"{target} = {expression}{note}")
            return
        function = HOST_OPERATORS[node.op_type].function
        name = f"host_{node.op_type.lower()}"
        self.namespace[name] = function
        accepted = keyword_names(function)
        arguments += [f"{k}={literal(v)}" for k, v in attributes.items() if k in accepted]
        self._line(f"{target} = {name}({', '.join(arguments)}){note}")

    def _tensor_node(self, node: ir.Node) -> None:
        graph, values = self.layout.graph, self.layout.values
        key = graph.node_key(node)
        operator = values.operators[key]
        arguments = [self._argument(node, i) for i in range(len(node.inputs))]
        while arguments and arguments[-1] == "None":
            arguments.pop()
        replaced = key in self.program.kernels
        if replaced:
            name = f"kernel_{len(self.namespace)}"
            self.namespace[name] = self.program.kernels[key]
        else:
            name = self._function(operator.function)
            arguments += self._keywords(node, operator)
        call = f"{name}({', '.join(arguments)})"
        targets = [self._local(graph.key(v)) if v.name else "_" for v in node.outputs]
        if len(targets) > 1:
            self._line(f"{', '.join(targets)}, *_ = {call}{comment(key)}")
            self._line("del _")  # outputs that nothing reads
        else:
            pick = "[0]" if operator.returns_tuple and not replaced else ""
            self._line(f"{targets[0]} = {call}{pick}{comment(key)}")

    def _function(self, function: Callable[..., Any]) -> str:
        name = function.__name__
        while (
            keyword.iskeyword(name)
            or name in TAKEN_NAMES
            or self.namespace.setdefault(name, function) is not function
        ):
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
            parts.append(f"dtype={self._dtype(node.outputs[0])}")
        if operator.prepare is not None:
            constant = f"constant_{len(self.namespace)}"
            self.namespace[constant] = self.layout.values.prepared[self.layout.graph.node_key(node)]
            return [*parts, f"prepared={constant}"]
        accepted = keyword_names(operator.function)
        for name, value in operator.keywords(tensors_to_torch(attributes_of(node))).items():
            assert name in accepted, "checked when the model was loaded"
            if isinstance(value, torch.Tensor):
                constant = f"constant_{len(self.namespace)}"
                self.namespace[constant] = value
                parts.append(f"{name}={constant}")
            else:
                parts.append(f"{name}={literal(value)}")
        return parts

    # --- values ----------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _local(self, key: str) -> str:
        return f"v{self.layout.numbers[key]}"

    def _argument(self, node: ir.Node, index: int) -> str:
        value = node.inputs[index]
        if value is None:
            return "None"
        number = self.layout.as_number(node, index)
        if number is not None:
            return literal(number)
        if self.layout.is_host_use(node, index):
            return self._number(value)
        text = self._tensor(value)
        point = UsePoint(self.layout.graph.node_key(node), index)
        tap = self.program.taps.get(point)
        return text if tap is None else f"{self._tap(point, tap)}({text})"

    def _number(self, value: ir.Value) -> str:
        """Return the text of a value as Python numbers."""
        key = self.layout.graph.key(value)
        values = self.layout.values
        if key in values.constants:
            return literal(values.constants[key].tolist())
        return self._local(key) if key in values.hosts else f"{self._tensor(value)}.tolist()"

    def _tensor(self, value: ir.Value) -> str:
        """Return the text of a value as a tensor."""
        key = self.layout.graph.key(value)
        values = self.layout.values
        if key in values.hosts:
            self.namespace["as_tensor"] = as_tensor
            self.needs_device = True
            return f"as_tensor({self._local(key)}, {self._dtype(value)}, device)"
        if key in values.constants:
            name = f"_constant_{self.layout.numbers[key]}"
            self.buffers[name] = to_torch(ir.tensor(values.constants[key]))
            return f"self.{name}"
        slot = self.layout.slots.get(key)
        if slot is not None and slot.path[: len(self.region.path)] == self.region.path:
            return access("self", (*slot.path[len(self.region.path) :], slot.name))
        return self._local(key)

    def _dtype(self, value: ir.Value) -> str:
        """Return the name of the element type of a value, None where inference did not find it."""
        dtype = TORCH_DTYPES.get(self.layout.graph.type_of(value).dtype or ir.DataType.UNDEFINED)
        if dtype is None:
            return "None"
        name = str(dtype).replace("torch.", "dtype_")
        self.namespace[name] = dtype
        return name
