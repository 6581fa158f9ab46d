"""What the user asks for: how tensors are quantized, and which nodes are."""

from qwrap.config.qconfig import SCOPES, QConfig
from qwrap.config.ranges import (
    METHODS,
    TRAININGS,
    WEIGHT_METHODS,
    Choice,
    Method,
    RangeOverride,
    Training,
)
from qwrap.config.region import FLOATS, Region, Selector
from qwrap.config.spec import QuantSpec, ScaleType, activation_spec, retyped
from qwrap.overrides import TensorOverride
from qwrap.targets import Scope

__all__ = [
    "FLOATS",
    "METHODS",
    "SCOPES",
    "TRAININGS",
    "WEIGHT_METHODS",
    "Choice",
    "Method",
    "QConfig",
    "QuantSpec",
    "RangeOverride",
    "Region",
    "ScaleType",
    "Scope",
    "Selector",
    "TensorOverride",
    "Training",
    "activation_spec",
    "retyped",
]
