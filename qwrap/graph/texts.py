"""The text in a message, which protobuf hands over as bytes where it is not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import Message

from qwrap.graph.nodes import bodies_of, graphs


def texts(proto: onnx.ModelProto) -> Iterator[object]:
    """Yield all names and other text of a model: ``str``, or ``bytes`` if unreadable."""
    yield from _texts_in(proto, but=("graph", "functions", "training_info"))
    for graph in graphs(proto.graph):
        yield from _texts_in(graph, but=("node", "initializer", "sparse_initializer"))
        for tensor in graph.initializer:
            yield from (tensor.name, tensor.doc_string)
    for function in proto.functions:
        yield from _texts_in(function, but=("node",))
    for nodes in bodies_of(proto):
        for node in nodes:
            yield from (node.name, node.op_type, node.domain, node.overload, node.doc_string)
            yield from (*node.input, *node.output)
            for entry in node.metadata_props:
                yield from (entry.key, entry.value)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.doc_string, attribute.ref_attr_name)


def _texts_in(message: Message, but: tuple[str, ...] = ()) -> Iterator[object]:
    for field, value in message.ListFields():
        if field.name in but:
            continue
        many = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
        for item in value if many else (value,):
            if field.type == field.TYPE_STRING:
                yield item
            elif field.type == field.TYPE_MESSAGE:
                yield from _texts_in(item)
