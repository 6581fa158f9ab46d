"""Targets by their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from qwrap.errors import ConfigError
from qwrap.targets.onnxruntime import ORT_CPU
from qwrap.targets.openvino import OPENVINO
from qwrap.targets.qnn import QNN
from qwrap.targets.target import Target
from qwrap.targets.tensorrt import TENSORRT
from qwrap.targets.vitisai import VITISAI

TARGETS: Mapping[str, Target] = MappingProxyType({
    target.name: target for target in (ORT_CPU, QNN, TENSORRT, OPENVINO, VITISAI)
})


def find_target(target: str | Target) -> Target:
    """Return a target by its name, or as it was given.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        nearest = difflib.get_close_matches(target, TARGETS, 1, cutoff=0.0)
        raise ConfigError(
            f"target={target!r}: choose one of {list(TARGETS)}, or give a qwrap.Target; the "
            f"nearest is {nearest[0]!r}"
        )
    return TARGETS[target]
