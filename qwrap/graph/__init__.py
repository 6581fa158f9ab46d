"""An ONNX file as onnx_ir: load it safely, find things in it, rewrite it, save it atomically."""

from qwrap.graph.index import OnnxGraph, ValueType
from qwrap.graph.load import read_model
from qwrap.graph.save import write_model

__all__ = ["OnnxGraph", "ValueType", "read_model", "write_model"]
