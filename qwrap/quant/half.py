"""Nodes that compute in half precision while the parameters they read stay float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwrap.model.substitute import Substitute, Tap
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.observe.sync import sum_over_ranks
from qwrap.quant.plan import HalfPlan
from qwrap.quant.stubs import Switch
from qwrap.rounding import through_half

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without


class HalfNode(Switch, Substitute):
    """Computes a node as one of float16 does: from rounded inputs, with the result rounded.

    Within, it computes in float32, as kernels do that add up products, and as onnxruntime does on
    CPUs, which have none for most operators. Between neighbours of this kind tensors are thus of
    float16, though they travel in float32. Gradients are those of float32, and so are the stored
    weights: small updates add up.

    While it observes, what is too large for float16 stays as it is and is counted.

    Attributes:
        plan: what is rounded.
        numbers: input that is no tensor, rounded -> what stands for it.
        overflown: how many finite values were too large.
    """

    indices = ()

    def __init__(self, name: str, plan: HalfPlan, numbers: Mapping[int, Any]) -> None:
        super().__init__(name)
        self.plan, self.numbers = plan, dict(numbers)
        self.overflown = 0

    def forward(
        self,
        function: Callable[..., Any],
        taps: Sequence[Tap | None],  # noqa: ARG002 -- there are none: no input has another form
        *inputs: Any,
        **keywords: Any,
    ) -> Any:
        """Compute the node."""
        if self.mode == "float":
            return function(*inputs, **keywords)
        numbers, plan = self.numbers, self.plan
        given = [
            numbers.get(i, x) if i not in plan.inputs or i in numbers else self._rounded(x)
            for i, x in enumerate(inputs)
        ]
        result = function(*given, **keywords)
        if not isinstance(result, tuple):
            return self._rounded(result) if plan.outputs else result
        return tuple(self._rounded(y) if i in plan.outputs else y for i, y in enumerate(result))

    def _rounded(self, x: Tensor) -> Tensor:
        half = through_half(x)
        if self.mode != "observe":
            return half
        beyond = half.isinf() & x.isfinite()
        self.overflown += int(beyond.count_nonzero())
        return torch.where(beyond, x, half)

    def made(self, index: int, stored: Tensor) -> Tensor:
        """Return what is stored: no input has another form."""
        del index
        return stored

    def unmade(self, index: int, wanted: Tensor) -> Tensor:
        """Return the same."""
        del index
        return wanted


def put_half(model: WrappedModel, half: Mapping[str, HalfPlan]) -> None:
    """Let exactly the nodes in ``half`` compute in float16, in place; those that do so stay."""
    known = dict(half_nodes(model))
    if not half and not known:
        return
    others = {key: model.substitute(key) for key in model.replaced if key not in known}
    nodes: dict[str, Substitute] = {}
    for key, plan in half.items():
        same = key in known and known[key].plan == plan
        nodes[key] = known[key] if same else HalfNode(key, plan, _numbers(model, key, plan))
    model.put_substitutes({**others, **nodes})


def half_nodes(model: WrappedModel) -> Iterator[tuple[str, HalfNode]]:
    """Yield the nodes of a prepared model that compute in float16, by key."""
    for key in model.replaced:
        found = model.substitute(key)
        if isinstance(found, HalfNode):
            yield key, found


def merge_half(model: WrappedModel, home: torch.device, group: ProcessGroup | None = None) -> None:
    """Let the nodes of every rank have counted what those of all ranks saw, in place."""
    for _, node in half_nodes(model):
        node.overflown = sum_over_ranks(node.overflown, home, group)


def _numbers(model: WrappedModel, key: str, plan: HalfPlan) -> dict[int, Any]:
    """Return the inputs that reach an operator as numbers, rounded to float16."""
    node = model.graph.nodes[key]
    numbers = {i: model.layout.as_number(node, i) for i in plan.inputs}
    return {
        i: np.asarray(number).astype(np.float16).tolist()
        for i, number in numbers.items()
        if number is not None
    }
