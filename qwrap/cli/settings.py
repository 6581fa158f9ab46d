"""From what was typed to a ``QConfig``."""

from __future__ import annotations

from typing import Any

import qwrap
from qwrap import QuantSpec
from qwrap.dtypes import quant_type
from qwrap.errors import ConfigError

NO_ACTIVATIONS = "none"


def weight_type(name: str | None, block_size: int | None) -> str | QuantSpec | None:
    """Return the type of weights asked for, with a scale per block if there are any."""
    if block_size is None:
        return name
    return QuantSpec(dtype=quant_type(name or "int8"), block_size=block_size)


def config_of(regions: list[str] | None = None, **asked: Any) -> qwrap.QConfig:
    """Return the settings asked for; a default has one home, so None is left to ``QConfig``."""
    settings = {key: value for key, value in asked.items() if value is not None}
    if settings.get("activation") == NO_ACTIVATIONS:
        settings["activation"] = None
    target = settings.pop("target", None)
    config = qwrap.QConfig.for_target(target, **settings) if target else qwrap.QConfig(**settings)
    for text in regions or ():
        _set_region(config, text)
    return config


def _set_region(config: qwrap.QConfig, text: str) -> None:
    """Add a region in the form of ``--set``, in place."""
    where, found, types = text.rpartition("=")
    first, _, last = where.partition(" to ")
    activation, _, weight = types.partition("/")
    if not found or not first or not (activation or weight):
        raise ConfigError(
            f"--set {text!r}: expected NODES=TYPE, NODES=TYPE/WEIGHT or NODES=/WEIGHT"
        )
    config.set(first, to=last or None, activation=activation or None, weight=weight or None)
