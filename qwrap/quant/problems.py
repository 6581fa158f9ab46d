"""What calibration shows cannot be quantized, after all."""

from __future__ import annotations

from collections.abc import Collection

from qwrap.model.wrapped import WrappedModel
from qwrap.quant.constants import deployed
from qwrap.quant.half import half_nodes
from qwrap.quant.observe.observers import HALF_SENTINEL, SENTINEL, MinMaxObserver, Observer
from qwrap.quant.placement.half import LARGEST
from qwrap.quant.prepare import place_without, plan_of, stubs
from qwrap.quant.sources import integer_users


def leave_out_problems(model: WrappedModel, known: Collection[str] = ()) -> None:
    """Return to float what no data reached, and what works on attention masks, in place.

    What was to compute in float16 is returned to float32 if its values are too large.

    Args:
        model: prepared, observed.
        known: source tensors whose range comes from elsewhere, so that their data does not matter.
    """
    without = dict(plan_of(model).without)
    while problems := _problems(model, known):
        assert not problems.keys() <= without.keys(), "a node stayed although it has to go"
        without = problems | without
        place_without(model, without)


def _problems(model: WrappedModel, known: Collection[str]) -> dict[str, str]:
    """Return node key -> why the node cannot be quantized, after all."""
    plan = plan_of(model)
    found = {
        key: f"not in float16: {node.overflown} values beyond {LARGEST:g}, where it ends"
        for key, node in half_nodes(model)
        if node.overflown
    }
    users = integer_users(plan, model.graph)
    for _, stub in stubs(model):
        watched = stub.observer if stub.name not in known else None
        problem = None if watched is None else _trouble(watched)
        if problem:
            reason = f"{problem} (tensor {stub.name!r})"
            found = (
                dict.fromkeys(sorted(users[stub.name]), reason) | found
            )  # the first is the cause
    for (node, _), constant in plan.constants.items():
        observer = MinMaxObserver(constant.value)
        observer.observe(deployed(model, constant.value))
        problem = _trouble(observer)
        if problem:
            found[node] = f"{problem} (constant {constant.value!r})"
    return found


def _trouble(observer: Observer) -> str | None:
    if observer.masked:
        return (
            f"works on {observer.masked} mask values, of magnitude {SENTINEL:g} or more "
            f"({HALF_SENTINEL:g} in float16)"
        )
    if observer.nonfinite:
        return f"works on {observer.nonfinite} values that are NaN or infinite"
    return None if observer.count else "no calibration data reached it"
