"""What rounding a tensor does behind the operators that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.model.operators import function_of_node
from qwrap.model.points import Program
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, fake_quantize
from qwrap.quant.auto.held_out import Outputs, outputs_of
from qwrap.quant.bounds import bounds_of
from qwrap.quant.observe.observers import SENTINEL
from qwrap.quant.prepare import plan_of
from qwrap.quant.scales import watched
from qwrap.quant.sources import source_of
from qwrap.quant.stubs import Stub

Candidates = Mapping[str, Sequence[QParams]]
"""Source tensor -> scales to try."""


class ConsumerErrors:
    """Measures, for single tensors, the error that each of several scales causes downstream.

    While the float program runs, every operator that computes on a tensor computes once more for
    each scale, with that input alone rounded. What merely moves values, or is absorbed, is looked
    through.

    Args:
        model: prepared; every stub in ``candidates`` is on it.
        candidates: what to try.
    """

    def __init__(self, model: WrappedModel, candidates: Candidates) -> None:
        self._model, self._candidates = model, candidates
        self._consumers = _consumers(model, candidates)

    @torch.no_grad()
    def run(self, batches: Iterable[Mapping[str, Any]]) -> list[Outputs]:
        """Add up the errors over ``batches``; return the float outputs for each."""
        with self._model.running(Program(kernels=self._consumers)):
            return [outputs_of(self._model, inputs) for inputs in batches]

    def sums(self) -> Tensor:
        """Return what was added up, float64 1-D on the CPU: sums of several processes may be added.

        The layout depends on model and candidates alone.
        """
        parts = [error for c in self._consumers.values() for error in c.errors.values()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def by_tensor(self, sums: Tensor) -> dict[str, Tensor]:
        """Return for each tensor the error of each candidate, float64 ``[N]``.

        It is relative to the power of each consumer's output in a batch, and summed over consumers
        and batches. Tensors that nothing computes on are missing.
        """
        result: dict[str, Tensor] = {}
        start = 0
        for consumer in self._consumers.values():
            for source, errors in consumer.errors.items():
                error = sums[start : start + len(errors)]
                start += len(errors)
                if error.isfinite().all():
                    result[source] = result.get(source, 0) + error
        return result


def _consumers(model: WrappedModel, candidates: Candidates) -> dict[str, _Consumer]:
    found: dict[str, _Consumer] = {}
    plan, graph, tensors = plan_of(model), model.graph, watched(model)
    for key, planned in plan.nodes.items():
        node = graph.nodes[key]
        uses: dict[str, list[int]] = {}
        for index, value in enumerate(node.inputs):
            source = None if value is None else source_of(plan, graph, value)
            if source is not None and source in candidates:
                uses.setdefault(source, []).append(index)
        function = function_of_node(model, key)
        if uses and function is not None and planned.role in ("integer", "pairs", "float"):
            stubs = {source: tensors[source] for source in uses}
            bounds = _bounds_behind(model, node)
            found[key] = _Consumer(function, uses, stubs, candidates, bounds)
    return found


def _bounds_behind(model: WrappedModel, node: ir.Node) -> tuple[float, float] | None:
    """Return where the activation cuts that the node's kernel absorbs, if there is one."""
    for user in node.outputs[0].consumers():
        planned = plan_of(model).nodes.get(model.graph.node_key(user))
        if planned is not None and planned.role == "absorbed":
            return bounds_of(model.layout.values, user)
    return None


class _Consumer:
    """One operator, in float, which adds up what rounding its inputs does to its output.

    Attributes:
        uses: source tensor -> the inputs that read it.
        errors: source tensor -> squared error of each candidate, relative to the output's power
            in each batch.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        uses: Mapping[str, Sequence[int]],
        stubs: Mapping[str, Stub],
        candidates: Candidates,
        bounds: tuple[float, float] | None,
    ) -> None:
        self._function, self.uses, self._stubs = function, uses, stubs
        self._candidates, self._bounds = candidates, bounds
        self.errors = {s: torch.zeros(len(candidates[s]), dtype=torch.float64) for s in uses}

    def __call__(self, *inputs: Any) -> Any:
        output = self._function(*inputs)
        wanted = self._clamped(output)
        if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
            return output
        ordinary = wanted.abs() < SENTINEL  # a mask's minus infinity has no error that counts
        power = torch.where(ordinary, wanted, 0).square().sum(dtype=torch.float64)
        if not power > 0:
            return output
        for source, indices in self.uses.items():
            found = [
                self._error(inputs, indices, self._stubs[source], qparams, wanted, ordinary)
                for qparams in self._candidates[source]
            ]
            self.errors[source] += (torch.stack(found) / power).cpu()
        return output

    def _error(
        self,
        inputs: Sequence[Any],
        indices: Sequence[int],
        stub: Stub,
        qparams: QParams,
        wanted: Tensor,
        ordinary: Tensor,
    ) -> Tensor:
        changed = list(inputs)
        x = inputs[indices[0]]
        scale, zero_point = qparams.scale.to(x.device), qparams.zero_point.to(x.device)
        for index in indices:
            changed[index] = fake_quantize(inputs[index], scale, zero_point, stub.grid)
        difference = self._clamped(self._function(*changed)) - wanted
        return torch.where(ordinary, difference, 0).square_().sum(dtype=torch.float64)

    def _clamped(self, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        return first if self._bounds is None else first.clamp(*self._bounds)
