"""Place quantization anew on a calibrated model, for another configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from qwrap.config import QConfig, QuantSpec
from qwrap.errors import NotCalibratedError
from qwrap.model.points import Point
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.calibrate import calibrate
from qwrap.quant.constants import fit_biases
from qwrap.quant.placement.place import place
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import install, plan_of, set_mode, stub_at, stubs
from qwrap.quant.rescale import fix_scales
from qwrap.quant.stubs import Stub


@torch.no_grad()
def place_again(model: WrappedModel, config: QConfig, batches: Iterable[Any]) -> None:
    """Quantize a calibrated model by another ``config``, in place.

    What is quantized as before keeps its scale, and its weight what algorithms made of it. Weights
    and biases of nodes that become float are those of the float model again.

    Args:
        model: calibrated, in ``eval`` mode.
        config: the graph is taken as it is: folding and batch normalization are settled.
        batches: as for ``calibrate``, in case that ranges are needed which nothing observed.

    Raises:
        ConfigError: ``config`` does not suit the model or its target.
    """
    earlier, scales = plan_of(model), _scales(model)
    plan = place(model.layout, config, without=earlier.without)
    plan.changes, plan.outcomes = earlier.changes, earlier.outcomes
    install(model, plan, config)
    _forget_rounding(model, earlier, plan)
    try:
        fix_scales(model)
    except NotCalibratedError:  # ranges came from a table, or what was observed was not kept
        calibrate(model, batches, progress=False)
        plan_of(model).changes = earlier.changes
    for point, stub in stubs(model):
        spec, qparams, limit = scales.get(point, (None, None, 0.0))
        if spec == stub.spec and qparams is not None:
            stub.set_qparams(qparams, limit)
    fit_biases(model)
    set_mode(model, "quantize")


Scale = tuple[QuantSpec, QParams, float]


def _scales(model: WrappedModel) -> dict[Point, Scale]:
    """Return the scale at every point that has one, with its spec and limit."""
    found: dict[Point, Scale] = {}
    for point in model.attached:
        if not isinstance(model.tap(point), Stub):
            continue
        stub = stub_at(model, point)
        qparams = stub.qparams
        kept = QParams(
            qparams.scale.clone(), qparams.zero_point.clone(), qparams.axis, qparams.block_size
        )
        found[point] = stub.spec, kept, float(stub.scale_limit)
    return found


def _forget_rounding(model: WrappedModel, earlier: QuantPlan, now: QuantPlan) -> None:
    """Give constants that are no longer quantized the values of the float model, in place."""
    freed = _stored(earlier) - _stored(now)
    reference = float_model(model) if freed else model
    for value in sorted(freed):
        original = reference.stored(value)
        if original is not None:
            model.assign(value, original)


def _stored(plan: QuantPlan) -> set[str]:
    """Return the initialisers that are stored as codes."""
    constants = {constant.value for constant in plan.constants.values()}
    return constants | {bias.value for bias in plan.biases.values()}
