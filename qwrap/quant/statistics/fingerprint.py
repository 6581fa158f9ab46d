"""Which model a file of statistics belongs to: its graph, and a digest of each of its weights."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwrap.errors import StatisticsError
from qwrap.graph.external import BLOCK, FileTensor
from qwrap.graph.index import OnnxGraph, ValueType, opset_of
from qwrap.graph.nodes import STANDARD
from qwrap.model.materialize import is_untouched
from qwrap.model.tensors import to_array
from qwrap.model.wrapped import WrappedModel
from qwrap.ops.registry import find, key_of, revision

DIGEST = 16  # bytes
LONGEST = 64  # characters of an attribute that are kept as they are; of a longer one, its digest
SHOWN = 3  # names in a message

Array = npt.NDArray[Any]
End = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class NodePrint:
    """What a node is, and where it stands.

    Attributes:
        key: of the node, see ``OnnxGraph``.
        op_type: with the domain if that is not ai.onnx.
        revision: the first one that computes what the node does.
        inputs: value keys, "" where one is left out.
        outputs: value keys.
        attributes: name -> text of the value, or its digest.
    """

    key: str
    op_type: str
    revision: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A graph and its weights, in a few kilobytes.

    Two models are the same if they compute the same with the same names: operators, attributes,
    wiring, types and shapes of graph inputs and outputs, and all weights, bit by bit. Another opset
    is no difference in itself, only what it makes of a node.

    Attributes:
        opset: of ai.onnx, as loaded.
        ends: ``"input"`` or ``"output"``, name, and type as in ``float[N,3,224,224]``.
        nodes: in graph order, those of bodies behind the node that runs them.
        weights: value key of an initialiser -> type and digest.
    """

    opset: int
    ends: tuple[End, ...]
    nodes: tuple[NodePrint, ...]
    weights: dict[str, str]

    @classmethod
    def of(cls, model: WrappedModel) -> Fingerprint:
        """Take the fingerprint of a model with the weights that it has now.

        Reads every weight once; those in files block by block.
        """
        graph, weights = model.graph, _weights(model)
        return cls(
            opset=model.loaded_opset,
            ends=(*_ends("input", graph, graph.inputs), *_ends("output", graph, graph.outputs)),
            nodes=tuple(_node_print(graph, key, weights) for key in graph.nodes),
            weights=weights,
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Say in which respect this model ("here") is not ``other`` ("there"), None if in none."""
        return (
            self._difference_of_ends(other, "input")
            or self._difference_of_nodes(other)
            or self._difference_of_ends(other, "output")
            or self._difference_of_weights(other)
        )

    def _difference_of_ends(self, other: Fingerprint, kind: str) -> str | None:
        ends = ([e for e in print_.ends if e[0] == kind] for print_ in (self, other))
        for pair in zip_longest(*ends):
            if pair[0] != pair[1]:
                texts = ["none" if e is None else f"{e[0]} {e[1]!r} {e[2]}" for e in pair]
                return f"{texts[0]} here, {texts[1]} there"
        return None

    def _difference_of_nodes(self, other: Fingerprint) -> str | None:
        # What was prepared for another type may have had its opset raised. That left every node as
        # it was, or rewrote it; so revisions tell nothing more of two models loaded at one opset.
        exact = self.opset != other.opset
        pairs = zip(self.nodes, other.nodes, strict=False)
        first = next(filter(None, (_node_difference(a, b, exact) for a, b in pairs)), None)
        mine, theirs = len(self.nodes), len(other.nodes)
        if mine == theirs:
            return first and f"the first difference is at {first}"
        if first is None:
            node = max(self.nodes, other.nodes, key=len)[min(mine, theirs)]
            first = f"node {node.key!r} ({node.op_type})"
        return f"{mine} nodes here, {theirs} there; the first difference is at {first}"

    def _difference_of_weights(self, other: Fingerprint) -> str | None:
        mine, theirs = self.weights, other.weights
        for names, where in (
            (sorted(mine.keys() - theirs.keys()), "only here"),
            (sorted(theirs.keys() - mine.keys()), "only there"),
        ):
            if names:
                return f"weights {_listed(names)} ({len(names)}) are {where}"
        wrong = [name for name, text in mine.items() if text != theirs[name]]
        for name in wrong:
            kinds = [text.rpartition(" ")[0] for text in (mine[name], theirs[name])]
            if kinds[0] != kinds[1]:
                return f"weight {name} is {kinds[0]} here, {kinds[1]} there"
        differ = f"({len(wrong)} of {len(mine)}) differ"
        return f"weights {_listed(wrong)} {differ}" if wrong else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able lists and dictionaries."""
        return {
            "opset": self.opset,
            "ends": [[*end] for end in self.ends],
            "nodes": [[*astuple(node)] for node in self.nodes],
            "weights": dict(self.weights),
        }

    @classmethod
    def from_dict(cls, content: Any) -> Fingerprint:
        """Take over what ``to_dict`` returned.

        Raises:
            StatisticsError: it did not return that.
        """
        try:
            nodes = (
                NodePrint(_text(k), _text(op), _number(n), _texts(reads), _texts(makes), _map(rest))
                for k, op, n, reads, makes, rest in _list(content["nodes"])
            )
            ends = ((_text(k), _text(name), _text(t)) for k, name, t in _list(content["ends"]))
            return cls(
                opset=_number(content["opset"]),
                ends=tuple(ends),
                nodes=tuple(nodes),
                weights=_map(content["weights"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StatisticsError("the fingerprint of its model is damaged") from error


def _list(content: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(content, (list, tuple)):
        raise TypeError
    return content


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError
    return content


def _number(content: Any) -> int:
    if type(content) is not int:
        raise TypeError
    return content


def _texts(content: Any) -> tuple[str, ...]:
    return tuple(map(_text, _list(content)))


def _map(content: Any) -> dict[str, str]:
    if not isinstance(content, dict):
        raise TypeError
    return {_text(key): _text(value) for key, value in content.items()}


# --- what differs --------------------------------------------------------------------------------


def _node_difference(mine: NodePrint, theirs: NodePrint, exact: bool) -> str | None:
    """Say in which respect a node is not the one in its place, ``exact``: its revision counts."""
    if mine.key != theirs.key:
        return f"node {mine.key!r} here, {theirs.key!r} there"
    if mine.op_type != theirs.op_type or (exact and mine.revision != theirs.revision):
        kinds = [f"{node.op_type}-{node.revision}" for node in (mine, theirs)]
        return f"node {mine.key!r} ({kinds[0]} here, {kinds[1]} there)"
    names = sorted({*mine.attributes, *theirs.attributes})
    parts = [name for name in names if mine.attributes.get(name) != theirs.attributes.get(name)]
    parts += ["inputs"] * (mine.inputs != theirs.inputs)
    parts += ["outputs"] * (mine.outputs != theirs.outputs)
    return f"node {mine.key!r} ({mine.op_type}, {_listed(parts)})" if parts else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


# --- taking it -----------------------------------------------------------------------------------


def _ends(kind: str, graph: OnnxGraph, values: Iterable[ir.Value]) -> Iterator[End]:
    for value in values:
        yield kind, value.name or "", _type_text(graph.type_of(value))


def _type_text(kind: ValueType) -> str:
    dtype = "?" if kind.dtype is None else kind.dtype.name.lower()
    if kind.kind != "tensor":
        return f"{kind.kind}({dtype})"
    if kind.shape is None:
        return dtype
    return f"{dtype}[{','.join('?' if n is None else str(n) for n in kind.shape)}]"


def _node_print(graph: OnnxGraph, key: str, weights: Mapping[str, str]) -> NodePrint:
    node = graph.nodes[key]
    return NodePrint(
        key=key,
        op_type=node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}",
        revision=_revision(graph, node),
        inputs=tuple("" if value is None else graph.key(value) for value in node.inputs),
        outputs=tuple(graph.key(value) if value.name else "" for value in node.outputs),
        attributes={
            name: _attribute_text(graph, attribute)
            for name, attribute in sorted(node.attributes.items())
            # A Constant that is a parameter is among the weights, with the value it has now.
            if not (attribute.type == ir.AttributeType.TENSOR and _made(graph, node) in weights)
        },
    )


def _made(graph: OnnxGraph, node: ir.Node) -> str | None:
    return graph.key(node.outputs[0]) if node.outputs and node.outputs[0].name else None


def _revision(graph: OnnxGraph, node: ir.Node) -> int:
    """Return the first revision that means the same as the one that a node uses."""
    domain = "" if node.domain in STANDARD else node.domain
    opset = opset_of(graph.model, domain)
    known = find(domain, node.op_type, opset)
    key = None if known is None else key_of(known.function)
    if key is not None and key[:2] == (domain, node.op_type):
        return key[2]
    return revision(domain, node.op_type, opset) or opset


def _attribute_text(graph: OnnxGraph, attribute: ir.Attr) -> str:
    """Return the value of an attribute, or the digest of a long one."""
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        is_one = attribute.type == ir.AttributeType.GRAPH
        bodies = [attribute.as_graph()] if is_one else attribute.as_graphs()
        ends = [[[graph.key(v) for v in body.inputs], [graph.key(v) for v in body.outputs]]
                for body in bodies]  # fmt: skip
        text = str(ends)
    elif attribute.type == ir.AttributeType.TENSOR:
        text = _tensor_text(attribute.as_tensor())
    elif attribute.type == ir.AttributeType.TENSORS:
        text = str([_tensor_text(tensor) for tensor in attribute.as_tensors()])
    else:
        text = str(attribute.value)
    return text if len(text) <= LONGEST else _digest([text.encode()])


def _weights(model: WrappedModel) -> dict[str, str]:
    """Return type and digest of every stored tensor as it is now, by value key."""
    graph = model.graph
    originals = {
        key: value.const_value
        for key, value in graph.values.items()
        if value.is_initializer() and value.const_value is not None
    }
    originals |= {key: model.layout.values.stored[key] for key in model.layout.slots}
    return {key: _weight_text(model, key, original) for key, original in originals.items()}


def _weight_text(model: WrappedModel, key: str, original: ir.TensorProtocol) -> str:
    tensor = model.deployed(key)
    if tensor is None or is_untouched(tensor, original):
        return _tensor_text(original)
    shape = ValueType(original.dtype, tuple(tensor.shape))
    return f"{_type_text(shape)} {_digest(_blocks(to_array(tensor, shape)))}"


def _tensor_text(tensor: ir.TensorProtocol) -> str:
    kind = _type_text(ValueType(tensor.dtype, tuple(int(n) for n in tensor.shape.numpy())))
    if isinstance(tensor, FileTensor) and tensor.is_plain:
        return f"{kind} {_digest(tensor.file.blocks(tensor.start, tensor.nbytes))}"
    return f"{kind} {_digest(_blocks(tensor.numpy()))}"


def _blocks(array: Array) -> Iterator[bytes | memoryview]:
    """Yield the values of an array, small-endian, in pieces."""
    if array.dtype.hasobject:  # text
        for item in array.flat:
            data = item if isinstance(item, bytes) else str(item).encode()
            yield len(data).to_bytes(8, "little")
            yield data
        return
    if sys.byteorder == "big":
        array = array.byteswap()
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, raw.size, BLOCK):
        yield raw[start : start + BLOCK].data


def _digest(blocks: Iterable[bytes | memoryview]) -> str:
    found = hashlib.blake2b(digest_size=DIGEST)
    for block in blocks:
        found.update(block)
    return found.hexdigest()
