"""Activation clipping: ranges of activations refined by the error behind what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.config import RangeOverride
from qwrap.model.points import ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams
from qwrap.ops.traits import OUTPUT_RANGES
from qwrap.quant.auto.consumers import ConsumerErrors
from qwrap.quant.auto.held_out import HeldOut
from qwrap.quant.outcome import Outcome
from qwrap.quant.placement.overrides import has_range
from qwrap.quant.prepare import config_of, plan_of, stub_at
from qwrap.quant.scales import activation_qparams, set_activations, span_of, watched, with_ends
from qwrap.quant.snapshot import Snapshot
from qwrap.quant.stubs import Stub
from qwrap.quant.trial import Inputs, attempt, split
from qwrap.quant.unify import Range, joined
from qwrap.targets import find_target

BOTH = (1.15, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the range, both ends together
EACH = (0.9, 0.8, 0.65, 0.5)  # of one end alone
LEAST_GAIN = 0.02  # of the error behind a tensor; less may be chance
PREFIXES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the tensors with the most to gain that change together."""


def clip_activations(
    model: WrappedModel, batches: Iterable[Any], *, progress: bool = True
) -> Outcome:
    """Shrink or widen the ranges of activations by the error that their rounding causes, in place.

    Around the range that there is, others are tried: of both ends together, and of each end alone
    where neither is 0. Each is judged by the error at the outputs of the operators that read the
    tensor, computed in float with that tensor alone rounded. Of the tensors that gain, those with
    the most to gain change, all or a half, a quarter or an eighth of them, whichever makes the
    outputs of the model best. Where tensors share a scale, as around a Concat, they keep sharing.

    Half of the batches teach; the other half decide whether the change is kept. One batch does
    both. Left alone are scales that an operator (Softmax) or the user dictates, types of more than
    8 bits, scales of channels, and tensors on which nothing computes.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; some 30 samples do. They are held in memory.
        progress: show a bar on a terminal.

    Returns:
        Whether the new ranges were kept, and what came of it.

    Raises:
        ConfigError: the model is not prepared.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: the choice behind consumers is qwrap's own, see ``QConfig.method`` "auto"; ratios as in
    Banner et al., arXiv:1810.05723, section 3, who derive them for distributions.
    """
    teaching, deciding = split(model, batches)

    @torch.no_grad()
    def clip() -> list[str]:
        groups, lines = _groups(model)
        changes = _changes(model, groups, teaching, progress=progress)
        count = _best_prefix(model, changes, teaching)
        _set(model, changes[:count])
        tensors = sum(len(group) for group in groups)
        moved = sum(len(change.qparams) for change in changes[:count])
        return [f"ranges of {moved} of {tensors} activations", *lines]

    return attempt(model, "activation clipping", deciding, clip)


@dataclass(frozen=True, slots=True)
class _Change:
    """New scales of tensors that share one.

    Attributes:
        gain: error behind them that it spares, relative to the power there.
        qparams: tensor -> its new scale.
    """

    gain: float
    qparams: Mapping[str, QParams]


# --- what may change -----------------------------------------------------------------------------


def _groups(model: WrappedModel) -> tuple[list[list[str]], list[str]]:
    """Return the tensors that may change, with those that have to change alike, and a line."""
    stubs = watched(model)
    free = {key for key, stub in stubs.items() if _is_free(model, key, stub)}
    group = {key: {key} for key in stubs}
    operators = find_target(config_of(model).target).unified | {"Concat"}
    for members in joined(plan_of(model), model.graph, operators):
        for first, second in combinations(sorted(members), 2):
            if not _share(model, first, second):
                continue
            together = group.get(first, set()) | group.get(second, set())
            group |= dict.fromkeys(together, together)
            if not {first, second} <= stubs.keys():  # one of them is dictated
                free -= together
    distinct = {id(members): sorted(members) for members in group.values()}
    found = [members for members in distinct.values() if free.issuperset(members)]
    left = len(stubs) - sum(map(len, found))
    return found, [f"{left} activations are fixed or of another kind"] if left else []


def _is_free(model: WrappedModel, key: str, stub: Stub) -> bool:
    planned, producer = plan_of(model).tensors[key], model.graph.values[key].producer()
    if has_range(planned.override or RangeOverride()) or stub.spec.axis is not None:
        return False
    if producer is not None and not producer.domain and producer.op_type in OUTPUT_RANGES:
        return False
    return stub.spec.dtype.bits <= 8 and stub.spec.dtype.function is None


def _share(model: WrappedModel, first: str, second: str) -> bool:
    """Return whether two tensors, or conversions, have the same scale."""
    point_of = plan_of(model).point_of
    return _are_equal(*(stub_at(model, point_of(key)).qparams for key in (first, second)))


def _are_equal(first: QParams, second: QParams) -> bool:
    return torch.equal(first.scale, second.scale) and torch.equal(
        first.zero_point, second.zero_point
    )


# --- what to try ---------------------------------------------------------------------------------


def _candidates(model: WrappedModel, key: str) -> list[QParams]:
    """Return the scale that a tensor has, and others."""
    stub, ends = stub_at(model, ValuePoint(key)), plan_of(model).tensors[key].ends
    low, high = span_of(stub.qparams, stub.spec)
    spans: list[Range] = [(low * ratio, high * ratio) for ratio in BOTH]
    if low < 0 < high and not stub.spec.symmetric:
        spans += [(low * ratio, high) for ratio in EACH]
        spans += [(low, high * ratio) for ratio in EACH]
    tried = [activation_qparams(model, key, with_ends(span, ends)) for span in spans]
    return [stub.qparams, *tried]


def _changes(
    model: WrappedModel,
    groups: Sequence[Sequence[str]],
    batches: Sequence[Inputs],
    *,
    progress: bool,
) -> list[_Change]:
    """Return what spares error behind the tensors, most first."""
    tried = {key: _candidates(model, key) for group in groups for key in group}
    measured = ConsumerErrors(model, tried)
    off = None if progress else True  # None: where there is no terminal
    measured.run(tqdm(batches, desc="clipping", unit="batch", disable=off))
    errors = measured.by_tensor(measured.sums())
    found = [_change(group, tried, errors) for group in groups]
    return sorted((c for c in found if c is not None), key=lambda change: -change.gain)


def _change(
    group: Sequence[str], tried: Mapping[str, Sequence[QParams]], errors: Mapping[str, Tensor]
) -> _Change | None:
    """Return the best for tensors that share a scale, None if that is what they have."""
    known = [errors[key] for key in group if key in errors]
    # Those of a group were equal, and so is what there is to try; but bounds may cut one.
    if not known or len({len(tried[key]) for key in group}) > 1:
        return None
    total = torch.stack(known).sum(0)
    best = int(total.argmin())
    qparams = {key: tried[key][best] for key in group}
    first = qparams[group[0]]
    if total[best] >= (1 - LEAST_GAIN) * total[0]:
        return None
    if not all(_are_equal(each, first) for each in qparams.values()):
        return None
    return _Change(float(total[0] - total[best]), qparams)


# --- what to keep --------------------------------------------------------------------------------


def _best_prefix(model: WrappedModel, changes: Sequence[_Change], batches: Sequence[Inputs]) -> int:
    """Return how many of ``changes`` make the outputs best."""
    if not changes:
        return 0
    held_out, snapshot = HeldOut(model, batches), Snapshot(model)
    counts = dict.fromkeys(max(1, round(share * len(changes))) for share in PREFIXES)
    errors: dict[int, float] = {}
    for count in counts:
        _set(model, changes[:count])
        errors[count] = held_out.error()
        snapshot.restore()
    return min(errors, key=lambda count: errors[count])


def _set(model: WrappedModel, changes: Sequence[_Change]) -> None:
    """Give tensors their new scales, in place; conversions of them, and biases, follow."""
    plan = plan_of(model)
    moved = {key: value for change in changes for key, value in change.qparams.items()}
    others = {key: _copy(stub.qparams) for key, stub in watched(model).items() if key not in moved}
    kept = {
        conversion.key: _copy(stub_at(model, conversion.points[0]).qparams)
        for key, conversion in plan.conversions()
        if plan.tensors[key].source not in moved
    }
    set_activations(model, {}, {**others, **moved}, kept)


def _copy(qparams: QParams) -> QParams:
    scale, zero_point = qparams.scale.clone(), qparams.zero_point.clone()
    return replace(qparams, scale=scale, zero_point=zero_point)
