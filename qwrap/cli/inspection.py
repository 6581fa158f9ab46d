"""``qwrap inspect``: what a file holds, and what of it would be quantized."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

import qwrap
from qwrap.cli.plan import print_plan
from qwrap.data.inputs import read_structure, shape_text
from qwrap.errors import QwrapError, QwrapWarning
from qwrap.ops.traits import QUANTIZED


def inspect_model(path: Path) -> tuple[dict[str, Any], qwrap.QuantPlan | None]:
    """Return the facts about the model at ``path`` as JSON-able values, and its plan.

    The plan, also among the facts, says what would be quantized; where qwrap cannot take the model
    it is None, and the fact ``problem`` says why. The fact ``notes`` lists what qwrap warns of, and
    what of the model is quantized already.

    Raises:
        ModelError: there is no such file, or it is no ONNX model.
    """
    model = read_structure(path)
    graph = model.graph
    initialised = {tensor.name for tensor in graph.initializer}
    nodes = [*_nodes(graph.node), *_nodes(n for f in model.functions for n in f.node)]
    plan, problem, notes = _plan(path)
    if codes := Counter(n.op_type for n in nodes if QUANTIZED.fullmatch(n.op_type)):
        counts = ", ".join(f"{name} {count}" for name, count in codes.most_common())
        notes.insert(0, f"quantized already: {counts}; computed as it stands")
    facts = {
        "path": str(path),
        "bytes": file_size(path),
        "ir_version": model.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "parameters": sum(prod(tensor.dims) for tensor in _tensors(graph)),
        "operators": dict(Counter(map(_operator, nodes)).most_common()),
        "functions": [_operator(function) for function in model.functions],
        "inputs": [_value(value) for value in graph.input if value.name not in initialised],
        "outputs": [_value(value) for value in graph.output],
        "plan": None if plan is None else plan.to_dict(),
        "problem": problem,
        "notes": notes,
    }
    return facts, plan


def print_inspection(facts: dict[str, Any], plan: qwrap.QuantPlan | None, console: Console) -> None:
    """Print what ``inspect_model`` found."""
    operators = ", ".join(f"{name} {count}" for name, count in facts["operators"].items())
    opsets = ", ".join(f"{domain} {version}" for domain, version in facts["opset"].items())
    lines = [
        facts["path"],
        f"  opset       {opsets}",
        f"  IR version  {facts['ir_version']}",
        f"  producer    {facts['producer'] or 'not given'}",
        f"  size        {facts['bytes']} bytes, {facts['parameters']} parameters",
        f"  inputs      {_values(facts['inputs'])}",
        f"  outputs     {_values(facts['outputs'])}",
        f"  operators   {operators}",
        *([f"  functions   {', '.join(facts['functions'])}"] if facts["functions"] else []),
        *(f"  note        {note}" for note in facts["notes"]),
        "",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    if plan is None:
        console.print(f"cannot be quantized: {facts['problem']}", markup=False, soft_wrap=True)
    else:
        print_plan(plan, console)


def file_size(path: Path) -> int:
    """Return the bytes of the model at ``path`` and of the external data where it says."""
    model = read_structure(path)
    locations = {
        entry.value
        for tensor in _tensors(model.graph)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    external = [path.parent / location for location in locations]
    present = [path, *(file for file in external if file.is_file())]
    return sum(int(file.stat().st_size) for file in present)


def _plan(path: Path) -> tuple[qwrap.QuantPlan | None, str | None, list[str]]:
    """Return the plan, or why there is none, and what qwrap warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QwrapWarning)
        try:
            plan, problem = qwrap.prepare(qwrap.load(path, quantized="nodes")), None
        except QwrapError as error:
            plan, problem = None, str(error)
    return plan, problem, [str(w.message) for w in caught if issubclass(w.category, QwrapWarning)]


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield ``nodes`` and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield initialisers and Constant values, of the graphs inside as well."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield attribute.t
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _operator(node: onnx.NodeProto | onnx.FunctionProto) -> str:
    name = node.op_type if isinstance(node, onnx.NodeProto) else node.name
    return f"{node.domain}::{name}" if node.domain else name


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind, shape = _type(value.type)
    return {"name": value.name, "type": kind, "shape": shape}


def _type(type_: onnx.TypeProto) -> tuple[str, list[int | str | None] | None]:
    """Return what a value is, as in ``sequence of float``, and the shape of its tensors."""
    kind = type_.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        inner, shape = _type(getattr(type_, kind).elem_type)
        return f"{kind.removesuffix('_type')} of {inner}", shape
    if kind != "tensor_type":
        return (kind or "unknown").removesuffix("_type"), None
    tensor = type_.tensor_type
    dims = [
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim
    ]
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return name, dims if tensor.HasField("shape") else None


def _values(values: list[dict[str, Any]]) -> str:
    return ", ".join(f"{v['name']} {v['type']}{shape_text(v['shape'])}" for v in values)
