"""An ONNX file as onnx_ir: load it safely, find things in it, rewrite it, save it atomically."""

from qwrap.graph.check import packed_size
from qwrap.graph.index import OnnxGraph, ValueType
from qwrap.graph.load import read_model
from qwrap.graph.nodes import graphs, label, subgraphs
from qwrap.graph.save import replace_file, write_model

__all__ = [
    "OnnxGraph",
    "ValueType",
    "graphs",
    "label",
    "packed_size",
    "read_model",
    "replace_file",
    "subgraphs",
    "write_model",
]
