"""An ONNX file as onnx_ir: load it safely, find things in it, rewrite it, save it atomically."""

from qwrap.graph.check import external_problem, packed_size
from qwrap.graph.index import OnnxGraph, ValueType, inferred_message
from qwrap.graph.load import borrowed_model, read_model
from qwrap.graph.nodes import graphs, label, subgraphs
from qwrap.graph.opset import raised_message
from qwrap.graph.save import replace_file, write_model

__all__ = [
    "OnnxGraph",
    "ValueType",
    "borrowed_model",
    "external_problem",
    "graphs",
    "inferred_message",
    "label",
    "packed_size",
    "raised_message",
    "read_model",
    "replace_file",
    "subgraphs",
    "write_model",
]
