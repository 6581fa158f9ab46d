"""Other weights for the same float function, kept if quantized outputs come closer to it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from qwrap.errors import NotCalibratedError
from qwrap.graph.divisible import Divisible
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.calibrate import calibrate
from qwrap.quant.edit import Edit, edit_constants, edit_graph, edited, float_difference
from qwrap.quant.outcome import Outcome
from qwrap.quant.prepare import plan_of, stubs
from qwrap.quant.trial import Inputs, attempt

TOLERANCE = 1e-5  # of the norm of a float output: some hundred roundings of float32
SHOWN = 3  # names for each reason


def change_equivalently(
    model: WrappedModel,
    algorithm: str,
    data: Sequence[Inputs],
    deciding: Sequence[Inputs],
    edit: Edit | None,
    details: Iterable[str],
    *,
    rewires: bool = False,
) -> Outcome:
    """Edit the float graph of a prepared model and calibrate it anew, in place, if that helps.

    Nothing is changed where the float outputs would differ by more than 1e-5 of their norm. A
    model that is not calibrated takes any other change, and is not calibrated afterwards either.

    Args:
        model: prepared, and calibrated or not.
        algorithm: its name, in words.
        data: batches to compare the float outputs by, and to calibrate with.
        deciding: those of them that decide.
        edit: what to do with the graph, None for nothing.
        details: what there is to say of it.
        rewires: whether ``edit`` changes nodes, so that the model has to be prepared again.
    """
    lines, difference = list(details), 0.0
    if edit is not None:
        graph = edited(model, edit)
        difference = float_difference(model, graph, data)
        if not difference <= TOLERANCE:
            lines.append(f"given up: float outputs would differ by {difference:.1g} of their norm")
            edit = None
        elif not rewires:
            lines.append(f"float outputs differ by {difference:.1g}")

    def change() -> list[str]:
        if edit is not None:
            (edit_graph if rewires else edit_constants)(model, edit)
            calibrate(model, data, progress=False)
        return lines

    if is_calibrated(model):
        return attempt(model, algorithm, deciding, change)
    if edit is not None:
        (edit_graph if rewires else edit_constants)(model, edit)
        lines.append("not calibrated: judged by the float outputs alone")
    outcome = Outcome(algorithm, edit is not None, 0.0, difference**2, tuple(lines))
    plan_of(model).outcomes.append(outcome)
    return outcome


def is_calibrated(model: WrappedModel) -> bool:
    """Whether all scales of a prepared model are known."""
    try:
        for _, stub in stubs(model):
            assert stub.qparams
    except NotCalibratedError:
        return False
    return True


def left_out(divisible: Divisible) -> list[str]:
    """Return a line for each reason why channels stay, with the first nodes that make such."""
    found: dict[str, list[str]] = defaultdict(list)
    for node, reason in divisible.left:
        if reason:
            kind = re.sub(r" \(.*\)$| '[^']*'", "", re.sub(r"^'[^']*'", "a tensor", reason))
            found[kind].append(node.name or node.outputs[0].name or "")
    lines = []
    for kind, names in sorted(found.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        lines.append(f"{len(names)} left: {kind} [{shown}]")
    return lines
