"""All of a prepared model's state, to go back to."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from qwrap.model.points import Point
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.half import half_nodes
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import decisions_of, plan_of, stubs
from qwrap.quant.stubs import Stub, Switch


class Snapshot:
    """What a prepared model was when this was made.

    Weights are held once more meanwhile. Tensors, stubs and the plan are the same objects after
    ``restore`` as before, even if the graph was rewritten in between, so that optimizers and other
    holders of them go on.

    Args:
        model: prepared.
    """

    @torch.no_grad()
    def __init__(self, model: WrappedModel) -> None:
        self._model, self._layout = model, model.layout
        self._slots = {key: _stored(model, key) for key in model.layout.slots}
        self._taps: dict[Point, torch.nn.Module] = {p: model.tap(p) for p in model.attached}
        self._substitutes = {key: model.substitute(key) for key in model.replaced}
        self._kernels = dict(model.kernels)
        self._own = {name: getattr(model, name) for name in OWN}
        self._decisions = decisions_of(model)
        self._decided = {k: copy.copy(v) for k, v in _flags(self._decisions, DECIDED).items()}
        plan = plan_of(model)
        self._planned = {f.name: copy.copy(getattr(plan, f.name)) for f in fields(QuantPlan)}
        switches = {tap for tap in self._taps.values() if isinstance(tap, Switch)}
        self._flags = [(tap, _flags(tap, FLAGS)) for tap in switches]
        self._overflown = [(node, node.overflown) for _, node in half_nodes(model)]
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        for _, stub in stubs(model):  # those on several points are held elsewhere
            tensors |= {id(t): t for t in (*stub.parameters(), *stub.buffers())}
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Let the model be what it was, in place, bit for bit."""
        model = self._model
        if model.layout is not self._layout:
            model.become(self._layout, self._slots)
        for tensor, values in self._tensors:
            tensor.copy_(values)
        if self._substitutes or model.replaced:
            model.put_substitutes(self._substitutes)
        for tap, flags in self._flags:
            for name, value in flags.items():
                setattr(tap, name, value)
            if isinstance(tap, Stub):
                tap.drop_held()
        model.attach(self._taps, self._kernels)
        model.add_module("quantization", self._decisions)
        for name, value in {**self._own}.items():
            setattr(model, name, value)
        for name, value in self._decided.items():
            setattr(self._decisions, name, copy.copy(value))
        for node, count in self._overflown:
            node.overflown = count
        plan = plan_of(model)
        for name, value in self._planned.items():
            setattr(plan, name, copy.copy(value))


OWN = ("plan", "config", "samples", "origin", "programs", "before_loading")
DECIDED = ("without", "batches", "left_out", "live")
FLAGS = ("mode", "observer", "following", "_learning", "_learning_zero_point", "_converts")
"""Attributes of the model, of its ``Decisions``, and of what sits on points."""


def _flags(holder: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(holder, name) for name in names if hasattr(holder, name)}


def _stored(model: WrappedModel, key: str) -> Tensor:
    tensor = model.stored(key)
    assert tensor is not None
    return tensor
