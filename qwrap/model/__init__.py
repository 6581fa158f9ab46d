"""The graph as an eager, trainable torch module tree."""

from qwrap.model.block import Block
from qwrap.model.build import load
from qwrap.model.points import OutputPoint, Point, Program, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel

__all__ = [
    "Block",
    "OutputPoint",
    "Point",
    "Program",
    "UsePoint",
    "ValuePoint",
    "WrappedModel",
    "load",
]
