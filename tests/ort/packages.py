"""onnxruntime's package and the drop-in by name, as scripts import them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import onnx

OWN, INCUMBENT = "qwrap.ort", "onnxruntime.quantization"


def part(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}")


def graph_form(path: Path) -> list[Any]:
    nodes = onnx.load(path).graph.node
    return sorted((n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in nodes)
