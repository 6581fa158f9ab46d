"""Samples on disk, or from a function, as batches: what the shell calibrates and verifies with."""

from qwrap.data.inputs import GraphInput, graph_inputs
from qwrap.data.preprocessing import PRESETS, Preprocessing, read_preprocessing
from qwrap.data.source import FUNCTION, Batches, find_function, open_data

__all__ = [
    "FUNCTION",
    "PRESETS",
    "Batches",
    "GraphInput",
    "Preprocessing",
    "find_function",
    "graph_inputs",
    "open_data",
    "read_preprocessing",
]
