"""The scales of weights and other constants, and the room that biases need."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from qwrap.config import WEIGHT_METHODS, QuantSpec, RangeOverride
from qwrap.errors import QwrapWarning
from qwrap.model.points import UsePoint
from qwrap.model.shards import whole
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, choose_qparams, round_scale
from qwrap.quant.placement.overrides import has_range, qparams_of
from qwrap.quant.plan import ConstantPlan
from qwrap.quant.prepare import config_of, plan_of, stub_at
from qwrap.quant.ranges import choose_weight_range

LARGEST_BIAS = 2**30  # codes; half of int32, so that the accumulator has room beside it


def deployed(model: WrappedModel, value: str) -> Tensor:
    """Return a constant of the model as it would be deployed now, all of it if it is sharded."""
    tensor = model.deployed(value)
    assert tensor is not None
    return whole(tensor)


@torch.no_grad()
def set_constants(model: WrappedModel) -> None:
    """Choose the scales of weights and constant operands, in place."""
    for point, constant in plan_of(model).constants.items():
        stub = stub_at(model, UsePoint(*point))
        stub.set_qparams(_constant_qparams(model, constant, stub.spec))


def _constant_qparams(model: WrappedModel, constant: ConstantPlan, spec: QuantSpec) -> QParams:
    override = constant.override or RangeOverride()
    if constant.given is not None and constant.given.scale is not None:
        return given_qparams(constant, spec)
    if constant.given is None and has_range(override):
        return qparams_of(constant.value, override, spec)  # one scale, for all channels
    config = config_of(model)
    method = override.method if override.method in WEIGHT_METHODS else config.weight_method
    low, high = choose_weight_range(deployed(model, constant.value), spec, method)
    if constant.given is not None:
        low, high = _said(constant.given.low, low), _said(constant.given.high, high)
    return choose_qparams(low, high, spec)


def _said(ends: tuple[float, ...] | None, observed: Tensor) -> Tensor:
    """Return one end of the ranges of a constant: what was said of it, if anything was."""
    if ends is None:
        return observed
    return torch.tensor(ends, dtype=observed.dtype).expand_as(observed)


def given_qparams(constant: ConstantPlan, spec: QuantSpec) -> QParams:
    """Return the scales and zero points that were said of a constant.

    Args:
        constant: has ``given`` scales.
        spec: how it is quantized.
    """
    assert constant.given is not None
    scale, zero_point = constant.given.scale, constant.given.zero_point
    assert scale is not None
    stored = round_scale(torch.tensor(scale, dtype=torch.float32), spec).to(torch.float32)
    return QParams(stored, torch.tensor(zero_point, dtype=torch.int32), spec.axis)


@torch.no_grad()
def fit_biases(model: WrappedModel) -> None:
    """Enlarge the weight scale of channels whose bias would overflow int32, in place."""
    plan = plan_of(model)
    for bias in plan.biases.values():
        weight = stub_at(model, UsePoint(*bias.weight))
        activation = stub_at(model, plan.point_of(bias.activation))
        least = deployed(model, bias.value).abs() / (activation.scale * LARGEST_BIAS)
        if weight.scale.numel() == 1:
            least = least.max().reshape(1)
        if (least > weight.scale).any():
            enlarged = torch.maximum(weight.scale, least)
            scale = round_scale(enlarged, weight.spec).to(torch.float32)
            weight.set_qparams(replace(weight.qparams, scale=scale))


def warn_of_enlarged(model: WrappedModel) -> None:
    """Warn of scales that the user gave and that had to be enlarged for a bias."""
    for bias in plan_of(model).biases.values():
        override = plan_of(model).constants[bias.weight].override
        constant = plan_of(model).constants[bias.weight]
        stub = stub_at(model, UsePoint(*bias.weight))
        if constant.given is not None and constant.given.scale is not None:
            given = given_qparams(constant, stub.spec).scale
        elif override is not None and override.scale is not None:
            given = qparams_of(stub.name, override, stub.spec).scale
        else:
            continue
        enlarged = stub.scale > given
        if enlarged.any():
            first = int(enlarged.nonzero()[0])
            warnings.warn(
                f"weight {stub.name!r}: scale={float(given[min(first, given.numel() - 1)]):g} "
                f"would let codes of bias {bias.value!r} overflow int32; it was enlarged to "
                f"{float(stub.scale[first]):g}",
                QwrapWarning,
                stacklevel=2,
            )
