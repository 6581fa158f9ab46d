"""Makes a file with qwrap in a process of its own, for bench_accuracy.py."""

from __future__ import annotations

import inspect

import file_order
import torch

import qwrap

_EFFORTS = {"plain": "none", "default": "default", "high": "high"}


def make(order: file_order.Order) -> list[str]:
    """Quantize as a user does, with no options beyond types and effort; return what was done."""
    config = qwrap.QConfig(weight=f"int{order.weight}", activation=f"uint{order.activation}")
    options = {"effort": _EFFORTS[order.effort], "seed": 0}
    known = inspect.signature(qwrap.quantize).parameters
    model = qwrap.quantize(
        order.source,
        order.target,
        calibration=order.data,
        config=config,
        progress=False,
        **{name: value for name, value in options.items() if name in known},
    )
    return model.plan.summary().splitlines()


if __name__ == "__main__":
    file_order.serve(make, f"with torch {torch.__version__}")
