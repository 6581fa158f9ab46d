"""Samples on disk, or from a function, as batches: what the shell calibrates and verifies with."""

from qwrap.data.inputs import GraphInput, graph_inputs
from qwrap.data.preprocessing import PRESETS, Preprocessing, read_preprocessing
from qwrap.data.source import Batches, open_data

__all__ = [
    "PRESETS",
    "Batches",
    "GraphInput",
    "Preprocessing",
    "graph_inputs",
    "open_data",
    "read_preprocessing",
]
