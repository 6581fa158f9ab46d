"""Figures that tell how a quantized training fares, for TensorBoard and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qwrap.model import shards
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import quantize, spread
from qwrap.quant.clamp import Clamp
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import stubs
from qwrap.quant.stubs import Stub
from qwrap.train.weights import models_in

WIDTH = 40  # of a tensor's name in a table; the end of it tells more


def statistics(model: nn.Module) -> dict[str, float]:
    """Return what scales and gradients are now, as ``{"<figure>/<tensor>": number}``.

    For every quantized tensor that has a scale of its own, by its ONNX name (behind the path of its
    model where ``model`` has several):

    - ``scale``, its mean where there are several, and then ``scale_min`` and ``scale_max``;
    - ``zero_point``, likewise the mean, where it is not given by the type;
    - ``gradient_scale``, ``gradient_zero_point``, ``gradient_clip``: norms of the gradients of what
      is trained, after a backward pass;
    - ``gradient_weight``: that of a weight;
    - ``gradient_ratio``: what a step of plain gradient descent changes in a weight's scale over
      what it changes in the weight, both relative. LSQ aims at about 1.

    Args:
        model: a prepared model, or a module with such models in it.

    Raises:
        ConfigError: there is no prepared model.

    Source: Esser et al., arXiv:1902.08153, section 2.2, for the ratio.
    """
    return _numbers({
        f"{figure}/{item.name}": value
        for item in _items(model)
        for figure, value in (*_scales(item), *_gradients(item))
    })


class Monitor(AbstractContextManager["Monitor"]):
    """Statistics that need more than a look: what is clipped, and how many codes change.

    Tensors are only looked at inside of a ``with`` block, so that other steps cost nothing::

        monitor = qwrap.train.Monitor(model)
        for step, (x, y) in enumerate(loader):
            with monitor if step % 100 == 0 else contextlib.nullcontext():
                loss_fn(model(x), y).backward()
            optimizer.step()
            if step % 100 == 0:
                for name, value in monitor.statistics().items():
                    writer.add_scalar(name, value, step)

    What ``torch.compile`` has compiled does not call it; run that step without.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the codes of weights, to compare with later.

        Args:
            model: a prepared model, or a module with such models in it.

        Raises:
            ConfigError: there is no prepared model.
        """
        self._model = model
        self._counts: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._codes = self._codes_now()

    def __enter__(self) -> Monitor:
        """Count what is clipped from now on, from zero."""
        self._counts = {}
        for item in _items(self._model):
            if item.stub.spec.dtype.function is None:
                self._hooks.append(item.stub.register_forward_pre_hook(self._counting(item)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop counting."""
        while self._hooks:
            self._hooks.pop().remove()

    def statistics(self) -> dict[str, float]:
        """Return ``statistics(model)``, and what was seen since the last call.

        - ``clipped_below`` and ``clipped_above``: shares of the values in the last ``with`` block
          that lay beyond the smallest and the largest code. What an activation function cuts off
          there is not clipped.
        - ``codes_changed``: share of a weight's codes that are others than at the last call.
        """
        seen: dict[str, Tensor] = {}
        for name, (below, above, count) in self._counts.items():
            seen[f"clipped_below/{name}"] = below / count
            seen[f"clipped_above/{name}"] = above / count
        codes = self._codes_now()
        for name, now in codes.items():
            before = self._codes.get(name)
            if before is not None:
                # torch compares no two tensors of some of these types; float32 holds all codes
                changed = now.to(torch.float32) != before.to(now.device, torch.float32)
                seen[f"codes_changed/{name}"] = changed.to(torch.float64).mean()
        self._codes = codes
        return {**statistics(self._model), **_numbers(seen)}

    @torch.no_grad()
    def _codes_now(self) -> dict[str, Tensor]:
        """Return the codes of the weights that are quantized."""
        return {
            item.name: quantize(item.weight, item.stub.qparams, item.stub.grid)
            for item in _items(self._model)
            if item.weight is not None and _rounds(item.stub)
        }

    def _counting(self, item: _Item) -> Any:
        @torch.no_grad()
        def count(stub: Stub, inputs: tuple[Tensor, ...]) -> None:
            if _rounds(stub) and inputs[0].numel():
                added = _clipped(inputs[0].detach().clamp(item.low, item.high), stub)
                self._counts[item.name] = self._counts.get(item.name, 0) + added

        return count


def statistics_table(found: Mapping[str, float]) -> str:
    """Return statistics as text: a row for each tensor, a column for each figure."""
    pairs = [(*key.partition("/")[::2], value) for key, value in found.items()]
    figures = list(dict.fromkeys(figure for figure, _, _ in pairs))
    rows: dict[str, dict[str, float]] = {}
    for figure, name, value in pairs:
        rows.setdefault(name, {})[figure] = value
    widths = {figure: max(len(figure), 9) for figure in figures}
    lines = [" ".join([f"{'tensor':{WIDTH}}", *(f"{f:>{w}}" for f, w in widths.items())])]
    for name, values in rows.items():
        shown = name if len(name) <= WIDTH else "…" + name[1 - WIDTH :]
        cells = [f"{values[f]:.3g}" if f in values else "" for f in figures]
        aligned = (f"{c:>{widths[f]}}" for f, c in zip(figures, cells, strict=True))
        lines.append(" ".join([f"{shown:{WIDTH}}", *aligned]).rstrip())
    return "\n".join(lines)


# --- one tensor ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A tensor with a scale of its own.

    Attributes:
        name: of the tensor.
        stub: rounds it.
        weight: what is rounded of a constant, None of an activation.
        parameter: where it has a gradient.
        low: what an absorbed activation function cuts off below.
        high: what it cuts off above.
    """

    name: str
    stub: Stub
    weight: Tensor | None
    parameter: Tensor | None
    low: float
    high: float


def _items(module: nn.Module) -> Iterator[_Item]:
    taken: set[str] = set()
    for prefix, model in models_in(module).items():
        kernels = model.kernels.values()
        clamps = {id(c.stub): (c.low, c.high) for c in kernels if isinstance(c, Clamp)}
        for point, stub in stubs(model):
            name = f"{prefix}{stub.name}"
            if name in taken and isinstance(point, UsePoint):
                name = f"{name}@{point.node}"  # another node that reads the same constant
            taken.add(name)
            ends = clamps.get(id(stub), (float("-inf"), float("inf")))
            yield _Item(name, stub, *_constant(model, point, stub), *ends)


def _constant(
    model: WrappedModel, point: object, stub: Stub
) -> tuple[Tensor | None, Tensor | None]:
    if not (isinstance(point, UsePoint) and stub.stored):
        return None, None
    assert isinstance(model.plan, QuantPlan)
    value = model.plan.constants[point.node, point.index].value
    weight = model.deployed(value)
    return (None if weight is None else shards.whole(weight.detach())), model.stored(value)


def _scales(item: _Item) -> Iterator[tuple[str, Tensor]]:
    stub = item.stub
    scale = stub.scale
    yield "scale", scale.mean()
    if scale.numel() > 1:
        yield "scale_min", scale.min()
        yield "scale_max", scale.max()
    if stub.spec.dtype.has_zero_point and not stub.spec.symmetric:
        yield "zero_point", stub.zero_point.to(torch.float64).mean()


def _gradients(item: _Item) -> Iterator[tuple[str, Tensor]]:
    gradients = {kind: parameter.grad for kind, parameter in item.stub.trained().items()}
    for kind, gradient in gradients.items():
        if gradient is not None:
            yield f"gradient_{kind}", _norm(gradient)
    weight = item.parameter
    if weight is None or weight.grad is None:
        return
    of_weight, of_scale = _norm(weight.grad), gradients.get("scale")
    yield "gradient_weight", of_weight
    if of_scale is not None and item.stub.training_by in ("lsq", "lsq+"):
        # That of the scale is relative as it stands: it is the gradient of a logarithm.
        yield "gradient_ratio", _norm(of_scale) * _norm(weight) / of_weight


def _norm(tensor: Tensor) -> Tensor:
    return shards.whole(tensor.detach().norm())


def _rounds(stub: Stub) -> bool:
    return (
        stub.mode == "quantize"
        and stub.spec.dtype.function is None
        and not bool(stub.scale.isnan().any())
    )


def _clipped(x: Tensor, stub: Stub) -> Tensor:
    """Return how many values lie below and above all codes, and how many there are."""
    spec, scale = stub.grid, spread(stub.scale, x.shape, stub.grid)
    steps = x.to(torch.float32) / scale
    if spec.dtype.is_integer:
        steps = steps.round_() + spread(stub.zero_point, x.shape, spec)
    below, above = (steps < spec.qmin).sum(), (steps > spec.qmax).sum()
    return torch.stack([below, above, torch.full_like(below, x.numel())]).to(torch.float64)


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return numbers, fetched from each device at once."""
    values: dict[str, float] = {}
    devices: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        devices.setdefault(tensor.device, []).append(name)
    for names in devices.values():
        fetched = torch.stack([tensors[name].detach().to(torch.float64) for name in names])
        values |= dict(zip(names, fetched.tolist(), strict=True))
    return {name: values[name] for name in tensors}
