"""Makes a file with qwrap in a process of its own, for bench_accuracy.py."""

from __future__ import annotations

import file_order
import torch

import qwrap

_EFFORTS = {"plain": "none", "default": "default", "high": "high"}


def make(order: file_order.Order) -> list[str]:
    """Quantize as a user does, with no options beyond types and effort; return what was done."""
    config = qwrap.QConfig(weight=f"int{order.weight}", activation=f"uint{order.activation}")
    model = qwrap.quantize(
        order.source,
        order.target,
        calibration=order.data,
        config=config,
        effort=_EFFORTS[order.effort],
        seed=0,
        progress=False,
    )
    return model.plan.summary().splitlines()


if __name__ == "__main__":
    file_order.serve(make, f"with torch {torch.__version__}")
