"""Write the forward of every Block: a statement a node, a local a value, freed after last use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from qwrap.model.attributes import attributes_of, tensors_to_torch
from qwrap.model.border import Border, Borders, dying, makes
from qwrap.model.expressions import access, comment, keyword_names, literal
from qwrap.model.flow import write_flow
from qwrap.model.fusing import Fusion, Item, with_fusions
from qwrap.model.host import HOST_OPERATORS
from qwrap.model.inline import inline
from qwrap.model.layout import Layout
from qwrap.model.points import OutputPoint, Point, Program, UsePoint, ValuePoint
from qwrap.model.scopes import Path, Region
from qwrap.model.substitute import Substitute
from qwrap.model.tensors import converted
from qwrap.model.values import is_flow
from qwrap.model.writer import Writer
from qwrap.ops import Operator
from qwrap.ops.element_types import DATA_TYPES


@dataclass(slots=True)
class Code:
    """What one Block needs: its text, the names in it, and the integer tables it reads.

    Attributes:
        buffers: attribute name -> constant tensor, not part of the ``state_dict``.
        needs_device: whether it takes the device as an argument.
        depends: what it was written for, see ``_Parts``.
    """

    path: Path
    source: str
    namespace: dict[str, Any]
    buffers: dict[str, torch.Tensor]
    needs_device: bool
    depends: Sequence[Dependency]


def generate(
    layout: Layout,
    program: Program,
    attached: Mapping[Point, str],
    known: Mapping[Path, Code] | None = None,
    replaced: Mapping[str, tuple[str, Substitute]] | None = None,
) -> list[Code]:
    """Return the code of all Blocks for ``program``, the root last.

    Args:
        layout: what is to run.
        program: what sits on its points. A tap that is in ``attached`` is called as the submodule
            of that name under ``taps`` of the Block it belongs to.
        attached: point -> name of the attached module there.
        known: code for another program of the same layout; returned as it is where nothing in the
            Block differs.
        replaced: node key -> its substitute, and the name of that under ``substitutes``.
    """
    parts = _Parts(layout, program, attached, replaced or {}, known or {})
    parts.write(layout.region)
    return parts.done


Dependency = tuple[tuple[object, ...], object]
"""A name of something that code was written for, and the thing itself."""


class _Parts:
    """The code of all Blocks, that of inner ones first.

    That of one Block depends on whether fusions may be used, on what sits on the points and nodes
    in it, and on which of the Blocks it calls need the device.
    """

    def __init__(
        self,
        layout: Layout,
        program: Program,
        attached: Mapping[Point, str],
        replaced: Mapping[str, tuple[str, Substitute]],
        known: Mapping[Path, Code],
    ) -> None:
        self._layout, self._program, self._attached = layout, program, attached
        self._replaced = replaced
        self._borders, self._known = Borders(layout), known
        self._sitting = _sitting(layout, program, attached, replaced)
        self.done: list[Code] = []

    def write(self, region: Region) -> Code:
        """Return the code of ``region``, after that of the regions inside it."""
        inner = [self.write(item) for item in region.items if isinstance(item, Region)]
        devices = {code.path: code.needs_device for code in inner}
        fused = not (self._program.taps or self._program.kernels)
        depends = [((fused, *devices.values()), None), *self._sitting.get(region.path, ())]
        code = self._known.get(region.path)
        if code is None or not _are_same(code.depends, depends):
            code = _BlockWriter(
                self._layout,
                self._program,
                self._attached,
                region,
                self._replaced,
                self._borders,
                devices,
            ).write(depends)
        self.done.append(code)
        return code


def _are_same(some: Sequence[Dependency], others: Sequence[Dependency]) -> bool:
    if len(some) != len(others):
        return False  # things are compared by identity: what ``==`` means to them is their own
    return all(a[0] == b[0] and a[1] is b[1] for a, b in zip(some, others, strict=True))


def _sitting(
    layout: Layout,
    program: Program,
    attached: Mapping[Point, str],
    replaced: Mapping[str, tuple[str, Substitute]],
) -> dict[Path, list[Dependency]]:
    """Return path -> what sits in the Block there."""
    found: dict[Path, list[Dependency]] = {}
    watchers = {ValuePoint(key): watcher for key, watcher in program.watchers.items()}
    for kind, things in (("tap", program.taps), ("watcher", watchers)):
        for point, thing in things.items():
            path = layout.points.get(point)  # None: nothing ever passes there
            if path is not None:
                found.setdefault(path, []).append(((kind, point, attached.get(point)), thing))
    on_nodes: list[tuple[str, Dependency]] = [
        *((key, (("kernel", key), kernel)) for key, kernel in program.kernels.items()),
        *((key, (("substitute", key, name), module)) for key, (name, module) in replaced.items()),
    ]
    for key, dependency in on_nodes:
        node = layout.graph.nodes.get(key)
        if node is not None and node in layout.homes:
            found.setdefault(layout.homes[node], []).append(dependency)
    return found


INSPECTIONS = {
    "Shape": "list({x}.shape{span})",
    "Size": "{x}.numel()",
    "SequenceLength": "len({x})",
    "OptionalHasElement": "{x} is not None",
}
"""What is read off a value, as text."""


class _BlockWriter(Writer):
    """Writes the nodes of a region."""

    def __init__(
        self,
        layout: Layout,
        program: Program,
        attached: Mapping[Point, str],
        region: Region,
        replaced: Mapping[str, tuple[str, Substitute]],
        borders: Borders,
        devices: Mapping[Path, bool],
    ) -> None:
        super().__init__(layout, program, attached, region, replaced)
        self.borders, self.devices = borders, devices

    # --- regions and bodies ----------------------------------------------------------------------

    def write(self, depends: Sequence[Dependency]) -> Code:
        """Return the code of this region, which calls those inside it."""
        border = self.borders[self.region]
        root = not self.region.path
        graph = self.layout.graph
        if root:
            inputs = tuple(graph.key(v) for v in graph.inputs)
            border = Border(inputs, tuple(graph.key(v) for v in graph.outputs))
            for key in inputs:
                self.finish_value(key)
        items = with_fusions(self.region, self.layout, self.program, self.replaced)
        dead = dying(map(self._touched, items), border.outputs, self.layout)
        for i, item in enumerate(items):
            if isinstance(item, Region):
                self._call(item)
            elif isinstance(item, Fusion):
                self._fusion(item)
            else:
                self._node(item)
            self.free(dead.get(i, ()))
        outputs = [
            self._output(i, graph.values[key]) if root else self.local(key)
            for i, key in enumerate(border.outputs)
        ]
        self.line("return " + (outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"))
        names = [self.local(key) for key in border.inputs]
        device = ["device"] if self.needs_device or root else []
        header = f"def run({', '.join(['self', *names, *device])}):\n"
        source = header + "\n".join(self.lines) + "\n"
        return Code(
            self.region.path, source, self.namespace, self.buffers, self.needs_device, depends
        )

    def _output(self, index: int, value: ir.Value) -> str:
        """Return the text of what the caller gets."""
        point = OutputPoint(index)
        tap = self.program.taps.get(point)
        text = self.tensor(value)
        return text if tap is None else f"{self.tap(point, tap)}({text})"

    def _touched(self, item: Item) -> Iterable[str]:
        """Return the values that ``item`` reads from outside itself and those it makes."""
        if isinstance(item, Fusion):
            values = (*item.inputs, *item.nodes[0].outputs)
            return [self.layout.graph.key(value) for value in values]
        return self.borders.touched(item)

    def _fusion(self, fusion: Fusion) -> None:
        graph = self.layout.graph
        arguments = ", ".join(map(self.tensor, fusion.inputs))
        key = graph.key(fusion.nodes[0].outputs[0])
        notes = "".join(comment(graph.node_key(node)) for node in fusion.nodes)
        self.line(f"{self.local(key)} = {self.function(fusion.function)}({arguments}){notes}")
        self.finish_value(key)

    def _call(self, region: Region) -> None:
        border = self.borders[region]
        values = self.layout.graph.values
        arguments = [
            self.local(key) if key in self.layout.values.hosts else self.tensor(values[key])
            for key in border.inputs
        ]
        if self.devices[region.path]:
            self.needs_device = True
            arguments.append("device=device")
        module = access("self", region.path[len(self.region.path) :])
        targets = ", ".join(self.local(key) for key in border.outputs)
        call = f"{module}({', '.join(arguments)})"
        self.line(f"{targets} = {call}" if targets else call)

    # --- nodes -----------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        graph, values = self.layout.graph, self.layout.values
        if is_flow(node):
            write_flow(self, node, self._node)
        elif all(key in values.hosts for key in makes(node, self.layout)):
            self._host(node)
        else:
            self._tensor_node(node)
        for value in node.outputs:
            if value.name and graph.key(value) not in values.hosts:
                self.finish_value(graph.key(value))

    def _host(self, node: ir.Node) -> None:
        graph = self.layout.graph
        target = self.local(graph.key(node.outputs[0]))
        attributes = attributes_of(node)
        note = comment(graph.node_key(node))
        if node.op_type in INSPECTIONS:
            assert node.inputs[0] is not None
            start, end = (attributes.get(name) for name in ("start", "end"))
            span = "" if (start, end) == (None, None) else f"[{literal(start)}:{literal(end)}]"
            template = INSPECTIONS[node.op_type]
            if node.op_type == "Size" and graph.type_of(node.inputs[0]).dtype == ir.DataType.STRING:
                template = "{x}.size"  # of a numpy array
            what = template.format(x=self.tensor(node.inputs[0]), span=span)
            self.line(f"{target} = {what}{note}")
            return
        arguments = ["None" if v is None else self.number(v) for v in node.inputs]
        types = [self.layout.values.host_type(v) for v in node.inputs]
        expression = inline(node.op_type, arguments, types, attributes)
        if expression is not None:
            self.line(f"{target} = {expression}{note}")
            return
        function = HOST_OPERATORS[node.op_type].function
        name = f"host_{node.op_type.lower()}"
        self.namespace[name] = function
        accepted = keyword_names(function)
        arguments += [f"{k}={literal(v)}" for k, v in attributes.items() if k in accepted]
        self.line(f"{target} = {name}({', '.join(arguments)}){note}")

    def _tensor_node(self, node: ir.Node) -> None:
        graph, values = self.layout.graph, self.layout.values
        key = graph.node_key(node)
        operator = values.operators[key]
        replaced = key in self.program.kernels
        name, substitute = ("", None) if replaced else self.replaced.get(key, ("", None))
        raw = () if substitute is None else substitute.indices
        arguments = [self._argument(node, i, is_raw=i in raw) for i in range(len(node.inputs))]
        while arguments and arguments[-1] == "None":
            arguments.pop()
        if replaced:
            name = self.bind("kernel", self.program.kernels[key])
        elif substitute is not None:
            taps = ", ".join(self._use_tap(key, i) or "None" for i in raw)
            function = self.function(operator.function)
            arguments = [function, f"[{taps}]", *arguments, *self._keywords(node, operator)]
            name = self.substitute(key)
        else:
            name = self.function(operator.function)
            arguments += self._keywords(node, operator)
        call = f"{name}({', '.join(arguments)})"
        targets = [self.local(graph.key(v)) if v.name else "_" for v in node.outputs]
        if len(targets) > 1:
            self.line(f"{', '.join(targets)}, *_ = {call}{comment(key)}")
            self.line("del _")  # outputs that nothing reads
        else:
            pick = "[0]" if operator.returns_tuple and not replaced else ""
            self.line(f"{targets[0]} = {call}{pick}{comment(key)}")

    def _keywords(self, node: ir.Node, operator: Operator) -> list[str]:
        parts = []
        if operator.wants_output_count:
            parts.append(f"output_count={len(node.outputs)}")
        if operator.wants_device:
            self.needs_device = True
            parts.append("device=device")
        if operator.wants_dtype:
            parts.append(f"dtype={self.dtype(node.outputs[0])}")
        if operator.wants_element_type:
            known = self._computed("to", self.layout.graph.type_of(node.outputs[0]).dtype)
            parts.append(f"element_type={literal(known)}")
        if operator.prepare is not None:
            prepared = self.layout.values.prepared[self.layout.graph.node_key(node)]
            return [*parts, f"prepared={self.bind('constant', prepared)}"]
        accepted = keyword_names(operator.function)
        for name, value in operator.keywords(tensors_to_torch(attributes_of(node))).items():
            assert name in accepted, "checked when the model was loaded"
            value = self._computed(name, value)
            if isinstance(value, torch.Tensor):
                constant = f"constant_{len(self.namespace)}"
                self.namespace[constant] = value
                parts.append(f"{name}={constant}")
            else:
                parts.append(f"{name}={literal(value)}")
        return parts

    def _computed(self, name: str, value: Any) -> Any:
        """Return an attribute with the type that the model computes in for float32."""
        dtype = self.layout.settings.dtype
        if dtype is None:
            return value
        if name in ("to", "dtype", "output_dtype") and value in (ir.DataType.FLOAT, "FLOAT"):
            code = DATA_TYPES[dtype]
            return code if value != "FLOAT" else ir.DataType(code).name  # Cast-1 names types
        is_float = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return converted(value, dtype) if is_float else value

    def _argument(self, node: ir.Node, index: int, *, is_raw: bool = False) -> str:
        """Return the text of an input; if ``is_raw``, of what is stored for it."""
        value = node.inputs[index]
        if value is None:
            return "None"
        number = self.layout.as_number(node, index)
        if number is not None:
            return literal(number)
        if self.layout.is_host_use(node, index):
            return self.number(value)
        text, key = self.tensor(value), self.layout.graph.node_key(node)
        if is_raw:
            return text
        if key in self.replaced and index in self.replaced[key][1].indices:
            text = f"{self.substitute(key)}.made({index}, {text})"
        tap = self._use_tap(key, index)
        return text if tap is None else f"{tap}({text})"

    def _use_tap(self, node: str, index: int) -> str | None:
        """Return the text of what sits on an input of a node."""
        point = UsePoint(node, index)
        tap = self.program.taps.get(point)
        return None if tap is None else self.tap(point, tap)
