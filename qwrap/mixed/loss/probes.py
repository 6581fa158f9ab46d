"""What looks at gradients on their way back, and multiplies them with rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwrap.mixed.choices import Choice
from qwrap.mixed.loss.carriers import Carrier, NodeSwitch, Place
from qwrap.mixed.loss.outputs import counting
from qwrap.model.operators import function_of_node
from qwrap.model.points import Point, Program, UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import fake_quantize, fake_quantize_bias
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import BiasStub, Stub, Switch

ROOM = 2**28  # bytes
Key = tuple[str, Choice]
Look = Callable[[Tensor, Tensor], None]
"""Called with the gradient of a tensor and the tensor."""

_Error = tuple[list[Key], Tensor]
"""The parts that a rounding error belongs to, and the error."""

_Rounding = tuple[Switch, Switch | None, list[Key]]
"""What rounds a tensor, what has rounded it before if it is a conversion, the parts it is in."""

_Change = tuple[Mapping[int, Switch], list[Key]]
"""What rounds some inputs of a node, by their index, and the parts it belongs to."""


class Products:
    """Inner products of gradients and rounding errors, their squares added up.

    Rounding errors of a batch are the same in all its backward passes: they are kept, up to
    ``ROOM``.
    """

    def __init__(self) -> None:
        self.rows, self._room = 1, 0
        self._now: dict[Key, Tensor] = {}
        self._totals: dict[Key, Tensor] = {}

    def begin(self, rows: int, passes: int) -> None:
        """Expect backward passes of a batch.

        Args:
            rows: samples in the batch.
            passes: how many there will be.
        """
        self.rows, self._room = rows, ROOM if passes > 1 else 0

    def has_room(self, errors: Sequence[_Error]) -> bool:
        """Return whether errors may be kept; then that much less will fit."""
        size = sum(error.nbytes for _, error in errors)
        if size > self._room:
            return False
        self._room -= size
        return True

    def add(self, keys: Sequence[Key], gradient: Tensor, error: Tensor, *, divides: bool) -> None:
        """Add the product of one tensor's to those of ``keys``, in place.

        Args:
            keys: parts that the tensor belongs to.
            gradient: of any shape.
            error: of the same shape.
            divides: whether the first axis may be that of the samples.
        """
        product = gradient.double() * torch.where(counting(gradient), error, 0.0).double()
        divides = divides and product.dim() > 0 and product.shape[0] == self.rows
        added = product.reshape(self.rows if divides else 1, -1).sum(1)
        for key in keys:
            known = self._now.get(key)
            if known is None:
                self._now[key] = added
            elif known.shape == added.shape:
                self._now[key] = known + added
            else:  # told apart in one of them only
                self._now[key] = known.sum().reshape(1) + added.sum().reshape(1)

    def close(self) -> None:
        """Square the products of a backward pass, in place."""
        for key, product in self._now.items():
            square = product.square().sum()
            self._totals[key] = self._totals[key] + square if key in self._totals else square
        self._now.clear()

    def total(self, name: str, choice: Choice) -> float:
        """Return the sum of squares for a part; 0 where no gradient came by."""
        found = self._totals.get((name, choice))
        return 0.0 if found is None else float(found)


class _Probe(torch.autograd.Function):
    """Passes a tensor on, and looks at its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, look: Look) -> Tensor:
        ctx.save_for_backward(x)
        ctx.look = look
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.look(gradient, x)
        return (gradient if ctx.needs_input_grad[0] else None), None, None


def probe(x: Tensor, look: Look) -> Tensor:
    """Return ``x``; whenever a gradient comes back, ``look`` sees it, also where x has none."""
    anchor = torch.zeros((), requires_grad=True, device=x.device)
    result: Tensor = _Probe.apply(x, anchor, look)  # type: ignore[no-untyped-call]  # torch's
    return result


def probes_of(
    model: WrappedModel,
    carriers: Sequence[Carrier],
    own: Mapping[str, Mapping[Choice, frozenset[Place]]],
    products: Products,
) -> Program:
    """Return a program that computes in float and fills ``products`` in backward passes.

    Args:
        model: what runs it.
        carriers: whose scales round.
        own: name of a part -> choice -> where its stubs are.
        products: to be filled.
    """
    on_points: dict[Point, list[_Rounding]] = {}
    on_nodes: dict[str, list[_Change]] = {}
    for carrier in carriers:
        points, nodes = _owners(carrier, own)
        for point, keys in points.items():
            before = _before(carrier, point)
            on_points.setdefault(point, []).append((carrier.tap(point), before, keys))
        for (node, indices), keys in nodes.items():
            own_taps = {i: carrier.tap(UsePoint(node, i)) for i in indices}
            on_nodes.setdefault(node, []).append((own_taps, keys))
    kernels: dict[str, Callable[..., Any]] = dict(model.kernels)
    for node, changes in on_nodes.items():
        function = function_of_node(model, node)
        if function is not None:
            first = ValuePoint(model.graph.key(model.graph.nodes[node].outputs[0]))
            divides = _may_divide(model, first)
            kernels[node] = _OnNode(function, changes, products, divides=divides)
            continue
        for switches, keys in changes:  # a gradient of the constant itself, of all samples at once
            for index, switch in switches.items():
                on_points.setdefault(UsePoint(node, index), []).append((switch, None, keys))
    taps: dict[Point, Callable[[Tensor], Tensor]] = {
        point: _OnTensor(roundings, products, divides=_may_divide(model, point))
        for point, roundings in on_points.items()
    }
    return Program(taps, kernels)


def _owners(
    carrier: Carrier, own: Mapping[str, Mapping[Choice, frozenset[Place]]]
) -> tuple[dict[Point, list[Key]], dict[tuple[str, tuple[int, ...]], list[Key]]]:
    """Return which parts own each activation, and each set of constants that one node reads."""
    plan = plan_of(carrier.model)
    stored = plan.constants.keys() | plan.biases.keys()
    on_points: dict[Point, list[Key]] = {}
    on_nodes: dict[tuple[str, tuple[int, ...]], list[Key]] = {}
    for name, by_choice in own.items():
        points = by_choice.get(carrier.choice, frozenset())
        key = name, carrier.choice
        constants: dict[str, list[int]] = {}
        for point in sorted(points, key=str):
            if isinstance(point, UsePoint) and (point.node, point.index) in stored:
                constants.setdefault(point.node, []).append(point.index)
                continue
            assert not isinstance(point, NodeSwitch)  # refused before
            table = plan.tensors[point.value].table if isinstance(point, ValuePoint) else None
            # What is looked up in a rounded table is not rounded again.
            if table is None or UsePoint(*table) not in points:
                on_points.setdefault(point, []).append(key)
        for node, indices in constants.items():
            on_nodes.setdefault((node, tuple(sorted(indices))), []).append(key)
    return on_points, on_nodes


def _before(carrier: Carrier, point: Point) -> Switch | None:
    """Return what rounds the tensor that the conversion at ``point`` is made of, if it is one."""
    plan = plan_of(carrier.model)
    for key, conversion in plan.conversions():
        if point in conversion.points:
            return carrier.tap(plan.point_of(plan.tensors[key].source))
    return None


def _may_divide(model: WrappedModel, point: Point) -> bool:
    """Return whether the first axis of a tensor may be that of samples, as far as is known.

    It is not where its size is known and that of the graph inputs is not.
    """
    if not isinstance(point, ValuePoint):
        return False
    kinds = [model.graph.type_of(value).shape for value in model.graph.inputs]
    open_inputs = any(shape and not isinstance(shape[0], int) for shape in kinds)
    kind = model.graph.types.get(point.value)
    return not (open_inputs and kind and kind.shape and isinstance(kind.shape[0], int))


def _rounded(tap: Switch, x: Tensor) -> Tensor:
    if isinstance(tap, BiasStub):
        return fake_quantize_bias(x, tap.scale)
    assert isinstance(tap, Stub)
    return fake_quantize(x, tap.scale, tap.zero_point, tap.grid)


class _Look:
    """Multiplies the gradient of one tensor with rounding errors.

    Args:
        products: takes in the products.
        errors: computes the errors of a tensor.
        divides: whether the first axis of the tensor may be that of samples.
    """

    def __init__(
        self, products: Products, errors: Callable[[Tensor], Iterator[_Error]], *, divides: bool
    ) -> None:
        self._products, self._errors, self._divides = products, errors, divides
        self._kept: list[_Error] | None = None

    def __call__(self, gradient: Tensor, x: Tensor) -> None:
        errors = self._kept
        if errors is None:
            errors = list(self._errors(x))
            self._kept = errors if self._products.has_room(errors) else None
        for keys, error in errors:
            self._products.add(keys, gradient, error, divides=self._divides)


class _OnTensor:
    """Sits on a tensor that is rounded."""

    def __init__(
        self, roundings: Sequence[_Rounding], products: Products, *, divides: bool
    ) -> None:
        self._roundings, self._products, self._divides = roundings, products, divides

    def __call__(self, x: Tensor) -> Tensor:
        return probe(x, _Look(self._products, self._errors, divides=self._divides))

    def _errors(self, x: Tensor) -> Iterator[_Error]:
        for tap, before, keys in self._roundings:
            known = x if before is None else _rounded(before, x)
            yield keys, torch.where(counting(x), _rounded(tap, known) - known, 0.0)


class _OnNode:
    """Computes a node whose constants are rounded, and looks at the gradient of its output."""

    def __init__(
        self,
        function: Callable[..., Any],
        changes: Sequence[_Change],
        products: Products,
        *,
        divides: bool,
    ) -> None:
        self._function, self._changes = function, changes
        self._products, self._divides = products, divides

    def __call__(self, *inputs: Any) -> Any:
        def errors(y: Tensor) -> Iterator[_Error]:
            for taps, keys in self._changes:
                changed = list(inputs)
                for index, tap in taps.items():
                    changed[index] = _rounded(tap, inputs[index])
                moved = self._function(*changed)
                moved = moved[0] if isinstance(moved, tuple) else moved
                yield keys, torch.where(counting(y), moved - y, 0.0)

        look = _Look(self._products, errors, divides=self._divides)
        result = self._function(*inputs)
        if isinstance(result, tuple):
            return probe(result[0], look), *result[1:]
        return probe(result, look)
