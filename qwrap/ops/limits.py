"""What attributes may hold: loading refuses what else a model says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Limit:
    """What an attribute may hold; of a list, each of its elements.

    Attributes:
        holds: whether one value is allowed.
        expected: that in words, behind "expected".
    """

    holds: Callable[[Any], bool]
    expected: str

    def allows(self, value: Any) -> bool:
        """Whether an attribute may be ``value``."""
        values = value if isinstance(value, (list, tuple)) else [value]
        return all(self.holds(v) for v in values)


def one_of(*choices: object) -> Limit:
    """Return the limit to a few texts or numbers."""
    return Limit(frozenset(choices).__contains__, f"one of {list(choices)}")


def at_least(lowest: int) -> Limit:
    """Return the limit to numbers from ``lowest`` on."""
    return Limit(lambda value: value >= lowest, f"at least {lowest}")


def between(lowest: int, highest: int) -> Limit:
    """Return the limit to numbers from ``lowest`` to ``highest``."""
    return Limit(lambda value: lowest <= value <= highest, f"{lowest} to {highest}")


FINITE = Limit(math.isfinite, "a finite number")
FLAG = one_of(0, 1)
POSITIVE = Limit(lambda value: value > 0, "more than 0")

FLAGS = (
    *("align_corners", "allowzero", "antialias", "causal", "ceil_mode", "center_point_box"),
    *("count_include_pad", "do_rotary", "exclude_outside", "exclusive", "fmod", "input_forget"),
    *("interleaved", "inverse", "is_causal", "is_test", "keepdims", "largest", "layout"),
    *("linear_before_reset", "noop_with_empty_axes", "normalize_variance", "onesided", "periodic"),
    *("reverse", "rotary_interleaved", "saturate", "select_last_index", "sorted", "spatial"),
    *("storage_order", "training_mode", "transA", "transB", "transBatchA", "transBatchB"),
    *("unidirectional", "upper"),
)
# Some kernels of onnxruntime take 2 for 0 and some for 1: what it means is not said anywhere.

COMMON: Mapping[str, Limit] = MappingProxyType({
    **dict.fromkeys(FLAGS, FLAG),
    **dict.fromkeys(("alpha", "beta", "gamma", "scale"), FINITE),
    # Shape inference cuts numbers off to 32 bits, and would find an axis that is none in range.
    **dict.fromkeys(("axes", "axis", "batch_axis", "time_axis"), between(-64, 63)),
    "auto_pad": one_of("NOTSET", "", "SAME_UPPER", "SAME_LOWER", "VALID"),
    "dilations": between(1, 2**31 - 1),
    "epsilon": at_least(0),
    "group": at_least(1),
    "hidden_size": at_least(1),
    "kernel_shape": between(1, 2**31 - 1),
    "output_padding": at_least(0),
    "pads": between(-(2**31), 2**31 - 1),
    "softcap": at_least(0),
    "strides": between(1, 2**31 - 1),
})
"""Attribute to what it may hold in every operator of ONNX and onnxruntime that has it."""
