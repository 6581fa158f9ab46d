"""Which texts an attribute may hold, as data: loading refuses what else a model says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

AUTO_PADS = ("NOTSET", "", "SAME_UPPER", "SAME_LOWER", "VALID")
DIRECTIONS = ("forward", "reverse", "bidirectional")
LOSS_REDUCTIONS = ("none", "mean", "sum")
ORDERS = ("DCR", "CRD")
SCATTER_REDUCTIONS = ("none", "add", "mul", "max", "min")

CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType({
    ("BitShift", "direction"): ("LEFT", "RIGHT"),
    ("DepthToSpace", "mode"): ORDERS,
    ("GRU", "direction"): DIRECTIONS,
    ("Gelu", "approximate"): ("none", "tanh"),
    ("GridSample", "mode"): ("bilinear", "linear", "nearest", "bicubic", "cubic"),
    ("GridSample", "padding_mode"): ("zeros", "border", "reflection"),
    ("LSTM", "direction"): DIRECTIONS,
    ("Momentum", "mode"): ("standard", "nesterov"),
    ("NegativeLogLikelihoodLoss", "reduction"): LOSS_REDUCTIONS,
    ("Pad", "mode"): ("constant", "reflect", "edge", "wrap"),
    ("RNN", "direction"): DIRECTIONS,
    ("Resize", "keep_aspect_ratio_policy"): ("stretch", "not_larger", "not_smaller"),
    ("Resize", "mode"): ("nearest", "linear", "cubic"),
    ("Resize", "nearest_mode"): ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    ("RoiAlign", "mode"): ("avg", "max"),
    ("ScatterElements", "reduction"): SCATTER_REDUCTIONS,
    ("ScatterND", "reduction"): SCATTER_REDUCTIONS,
    ("SoftmaxCrossEntropyLoss", "reduction"): LOSS_REDUCTIONS,
    ("SpaceToDepth", "mode"): ORDERS,
    ("TensorScatter", "mode"): ("linear", "circular"),
    ("Upsample", "mode"): ("nearest", "linear", "bilinear"),
})
"""Operator type and attribute to its values in any revision; ``auto_pad`` is the same for all."""


def refusals(op_type: str, attributes: Mapping[str, Any]) -> list[str]:
    """Return a complaint for each attribute whose value ONNX does not have."""
    complaints = []
    for name, value in attributes.items():
        choices = AUTO_PADS if name == "auto_pad" else CHOICES.get((op_type, name))
        if choices is not None and value not in choices:
            complaints.append(f"{name}={value!r} is none of {choices}")
    return complaints
