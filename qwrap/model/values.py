"""Where each value lives: known when the model is built, on the host, or on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qwrap.errors import ModelError, UnsupportedOpError
from qwrap.graph.index import OnnxGraph, bodies, opset_of
from qwrap.graph.nodes import STANDARD
from qwrap.model.attributes import attributes_of, complaints_of, tensors_to_torch
from qwrap.model.fallback import RuntimeNode
from qwrap.model.host import HOST_OPERATORS, SCALAR, HostType
from qwrap.model.settings import LoadSettings
from qwrap.model.tensors import to_torch
from qwrap.ops import Operator, find, registered, revision, suited

Array = npt.NDArray[Any]

LARGEST_CONSTANT = 4096  # elements; a larger integer table is data, not shape arithmetic
FLOW = ("If", "Loop", "Scan")
COUNTS = ("Size", "SequenceLength", "OptionalHasElement")  # one number each, known on the host


def is_flow(node: ir.Node) -> bool:
    """Whether the node runs graphs of its own."""
    return node.op_type in FLOW and node.domain in STANDARD


class Values:
    """The static analysis that code generation reads.

    Attributes:
        constants: value key -> integers or booleans that are known when the model is built.
        hosts: value key -> a Python int or list while the model runs (see ``host``).
        stored: value key -> tensor of an initialiser or Constant node that is not in
            ``constants``: a parameter or a buffer.
        texts: value key -> constant text.
        operators: node key -> what computes it, for nodes that run on tensors.
        fallbacks: keys of the nodes that onnxruntime computes.
        prepared: node key -> what the operator made of the attributes, for those that do.
        taken: node key of an If whose condition is constant -> the branch that always runs.
    """

    def __init__(self, graph: OnnxGraph, settings: LoadSettings) -> None:
        self.graph, self.settings = graph, settings
        self.constants: dict[str, Array] = {}
        self.hosts: dict[str, HostType] = {}
        self.texts: dict[str, Array] = {}
        self.stored: dict[str, ir.TensorProtocol] = {}
        self.operators: dict[str, Operator] = {}
        self.fallbacks: list[str] = []
        self.prepared: dict[str, Any] = {}
        self.taken: dict[str, str] = {}
        self._unsupported: list[str] = []
        self._visit_graph(graph.model.graph)
        if self._unsupported:
            raise UnsupportedOpError("; ".join(self._unsupported))

    def is_computed(self, value: ir.Value) -> bool:
        """Whether the value comes out of a node (or graph input) while the model runs."""
        key = self.graph.key(value)
        return key not in self.constants and key not in self.stored and key not in self.texts

    def is_known(self, key: str) -> bool:
        """Whether the value is no tensor that the code makes: constant, stored or on the host."""
        return any(key in c for c in (self.constants, self.stored, self.hosts, self.texts))

    def live_nodes(self, graph: ir.Graph) -> Iterator[ir.Node]:
        """Yield the nodes of one graph that run: neither constants nor foldable."""
        for node in graph:
            if any(v.name and self.is_computed(v) for v in node.outputs):
                yield node

    def branches(self, node: ir.Node) -> list[ir.Graph]:
        """Return the subgraphs of ``node`` that can run."""
        taken = self.taken.get(self.graph.node_key(node))
        return [body for name, body in bodies(node) if taken in (None, name)]

    def small_constant(self, value: ir.Value) -> Array | None:
        """Return the value as an array if it is known now and small, also for floats."""
        key = self.graph.key(value)
        if key in self.stored and self.stored[key].size <= LARGEST_CONSTANT:
            return self.stored[key].numpy()
        return self.constants.get(key)

    def _visit_graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            if value.const_value is not None:
                self._store(self.graph.key(value), value.const_value)
        for node in graph:
            self._visit_node(node)

    def _store(self, key: str, tensor: ir.TensorProtocol) -> None:
        if tensor.dtype == ir.DataType.STRING:
            self.texts[key] = to_torch(tensor)
            return
        exact = tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL
        if exact and tensor.size <= LARGEST_CONSTANT:
            self.constants[key] = tensor.numpy()
        else:
            self.stored[key] = tensor

    def _visit_node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain in STANDARD:
            self._store(self.graph.key(node.outputs[0]), constant_tensor(node))
        elif is_flow(node):
            self._visit_flow(node)
        elif not self._visit_shape(node) and not self._visit_host(node):
            self._visit_tensor(node)

    def _visit_flow(self, node: ir.Node) -> None:
        condition = node.inputs[0] if node.op_type == "If" else None
        known = None if condition is None else self.small_constant(condition)
        if known is not None:
            name = "then_branch" if known.item() else "else_branch"
            self.taken[self.graph.node_key(node)] = name
        for body in self.branches(node):
            if node.op_type == "Loop":  # the iteration number, and whether to go on
                for value in body.inputs[:2]:
                    if value.name:
                        self.hosts[self.graph.key(value)] = SCALAR
            self._visit_graph(body)

    def _visit_shape(self, node: ir.Node) -> bool:
        if node.op_type not in ("Shape", *COUNTS) or node.domain not in STANDARD:
            return False
        value = next(iter(node.inputs), None)
        key = self.graph.key(node.outputs[0])
        if value is None:  # OptionalHasElement of nothing
            self.constants[key] = np.array(False)
            return True
        host = self.hosts.get(self.graph.key(value))
        if (
            node.op_type in ("Shape", "Size") and host is not None and host.length != -1
        ):  # the shape of a host list is known now
            shape = [] if host.length is None else [host.length]
            self.constants[key] = np.array(
                shape if node.op_type == "Shape" else int(np.prod(shape))
            )
        elif node.op_type in COUNTS:
            self.hosts[key] = SCALAR
        else:
            rank = self.graph.type_of(value).rank
            start = _integer(node, "start", 0)
            end = _integer(node, "end", None)
            self.hosts[key] = HostType(-1 if rank is None else len(range(rank)[start:end]))
        return True

    def _visit_host(self, node: ir.Node) -> bool:
        operator = HOST_OPERATORS.get(node.op_type) if node.domain in STANDARD else None
        inputs = list(node.inputs)
        if operator is None or not any(v and self.graph.key(v) in self.hosts for v in inputs):
            return False
        types = [self.host_type(v) for v in inputs]
        if any(v is not None and t is None for v, t in zip(inputs, types, strict=True)):
            return False
        constants = [None if v is None else self._python(v) for v in inputs]
        result = operator.rule(types, constants, attributes_of(node))
        if result is not None:
            self.hosts[self.graph.key(node.outputs[0])] = result
        return result is not None

    def host_type(self, value: ir.Value | None) -> HostType | None:
        """Return what is known of a value as Python numbers, None if it is none."""
        if value is None:
            return None
        key = self.graph.key(value)
        if key in self.constants:
            array = self.constants[key]
            return HostType(len(array)) if array.ndim == 1 else SCALAR if array.ndim == 0 else None
        return self.hosts.get(key)

    def _python(self, value: ir.Value) -> Any:
        array = self.constants.get(self.graph.key(value))
        return None if array is None else array.tolist()

    def _visit_tensor(self, node: ir.Node) -> None:
        version = opset_of(self.graph.model, node.domain)
        domain = "" if node.domain in STANDARD else node.domain
        operator = find(domain, node.op_type, version)
        if operator is None:
            self._fall_back(node, domain, version)
            return
        if complaints := complaints_of(node, operator):
            key = self.graph.node_key(node)
            self._unsupported += [f"node {key!r} ({node.op_type}): {text}" for text in complaints]
            return
        if not domain:
            types = [self.graph.type_of(v).dtype for v in node.inputs if v is not None]
            operator = suited(operator, node.op_type, types)
        self.operators[self.graph.node_key(node)] = operator
        if operator.prepare is not None and not self._prepare(node, operator):
            return
        is_known = all(v is None or self.graph.key(v) in self.constants for v in node.inputs)
        floats = [v for v in node.outputs if self.graph.type_of(v).is_float]
        if node.inputs and is_known and not floats:
            self._fold(node, operator)

    def _prepare(self, node: ir.Node, operator: Operator) -> bool:
        key = self.graph.node_key(node)
        try:
            bound = operator.bind(tensors_to_torch(attributes_of(node)))
        except ModelError as error:
            self._unsupported.append(f"node {key!r} ({node.op_type}): {error}")
            return False
        self.prepared[key] = bound["prepared"]
        return True

    def _fall_back(self, node: ir.Node, domain: str, version: int) -> None:
        key = self.graph.node_key(node)
        try:
            computed = RuntimeNode(self.graph, node, self.settings.libraries)
        except UnsupportedOpError as error:
            self._unsupported.append(explain(key, domain, node.op_type, version, str(error)))
            for _, body in bodies(node):
                self._visit_graph(body)  # to list what else is missing
            return
        self.operators[key] = Operator(
            function=computed, ignored=frozenset(node.attributes), returns_tuple=True
        )
        self.fallbacks.append(key)

    def _fold(self, node: ir.Node, operator: Operator) -> None:
        """Compute shape arithmetic on constants now: integers only, so no parameter is lost."""
        arguments = [self._folded(node, i, operator) for i in range(len(node.inputs))]
        attributes = operator.bind(tensors_to_torch(attributes_of(node)))
        if operator.wants_output_count:
            attributes["output_count"] = len(node.outputs)
        if operator.wants_element_type:
            attributes["element_type"] = self.graph.type_of(node.outputs[0]).dtype
        try:
            result = operator.function(*arguments, **attributes)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return  # left to fail, with its line, when and if it runs
        outputs: Sequence[Any] = result if isinstance(result, tuple) else (result,)
        if not all(_is_small_integers(o) for o in outputs):
            return
        for value, output in zip(node.outputs, outputs, strict=False):
            if value.name:
                self.constants[self.graph.key(value)] = output.numpy()

    def _folded(self, node: ir.Node, index: int, operator: Operator) -> Any:
        value = node.inputs[index]
        if value is None:
            return None
        array = self.constants[self.graph.key(value)]
        return array.tolist() if operator.wants_host(index) else to_torch(ir.tensor(array))


def _is_small_integers(output: Any) -> bool:
    """Whether a result of folding is one to keep: integers or booleans, and not too many."""
    if not isinstance(output, torch.Tensor) or output.numel() > LARGEST_CONSTANT:
        return False
    return not (output.is_floating_point() or output.is_complex())


def explain(node: str, domain: str, op_type: str, version: int, runtime: str = "") -> str:
    """Say that nothing computes an operator, nor onnxruntime for reason ``runtime``."""
    since = revision(domain, op_type, version)
    known = registered(domain, op_type)
    have = f"registered revisions: {known}" if known else "no revision of it is registered"
    return (
        f"node {node!r}: no implementation of {domain or 'ai.onnx'}::{op_type}"
        f"{f'-{since}' if since else f' at opset {version}'} ({have}"
        f"{f'; onnxruntime: {runtime}' if runtime else ''}); "
        f"add one with qwrap.register_op({domain!r}, {op_type!r}, since={since or 1})"
    )


def _integer(node: ir.Node, name: str, default: int | None) -> int | None:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def constant_tensor(node: ir.Node) -> ir.TensorProtocol:
    """Return the tensor of a Constant node, whichever attribute holds it."""
    ((name, attribute),) = node.attributes.items()
    if name == "value":
        return attribute.as_tensor()
    kind = np.float32 if "float" in name else np.int64 if "int" in name else np.str_
    return ir.tensor(np.array(attribute.value, kind), name=node.outputs[0].name)
