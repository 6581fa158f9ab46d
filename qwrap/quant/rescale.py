"""Choose every scale of a prepared model, after calibration or again later."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qwrap.config import Choice, RangeOverride
from qwrap.errors import NotCalibratedError, QwrapWarning, TableError
from qwrap.model.points import UsePoint, ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.auto.auto import auto_ranges
from qwrap.quant.constants import set_constants, warn_of_enlarged
from qwrap.quant.placement.overrides import has_range
from qwrap.quant.prepare import (
    config_of,
    decisions_of,
    place_without,
    plan_of,
    set_mode,
    stub_at,
    stubs,
)
from qwrap.quant.problems import leave_out_problems
from qwrap.quant.scales import bounds_at, cut_to_bounds, set_activations, span_of, watched, ways_of
from qwrap.quant.statistics.statistics import Statistics, restore
from qwrap.quant.stubs import Stub, Switch
from qwrap.quant.tables import RangeTable, TensorRange
from qwrap.quant.unify import Range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without


def rescale(
    model: WrappedModel,
    source: RangeTable | Statistics | None = None,
    *,
    method: Choice | None = None,
    percentile: float | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Choose every scale of a prepared model again, in place, without data.

    Afterwards the model simulates quantization, as after ``calibrate``. Where this fails, it is
    as it was.

    Args:
        model: prepared; calibrated, unless ``source`` tells all.
        source: where ranges come from: None for what the model's own observers saw; statistics
            of the same model, which its observers take over; or a table, whose entry may also
            stand under the name of a tensor that was moved from the one it is for. Tensors that a
            table lacks take the range that was observed.
        method: how ranges are chosen from now on, in place of ``model.config.method``. "auto"
            compares them on samples kept from calibration. After a calibration for "minmax" or
            "ema" there is no histogram, which the other methods need.
        percentile: the same for ``model.config.percentile``.
        group: for method "auto" in several processes of torch.distributed, all of which have to
            call this: those that decide together, all if None.

    Raises:
        ConfigError: the model is not prepared, a setting is unknown, or a method needs a histogram
            that is not there.
        NotCalibratedError: nothing was observed, or there are tensors that neither the table nor
            calibration has seen; the message lists them.
        StatisticsError: the statistics are those of another model.
        TableError: an entry does not fit its tensor.
    """
    plan_of(model)
    statistics = source if isinstance(source, Statistics) else None
    table = source if isinstance(source, RangeTable) else RangeTable({})
    config = config_of(model)
    config = replace(
        config,
        method=config.method if method is None else method,
        percentile=config.percentile if percentile is None else percentile,
    )
    if statistics is not None:
        statistics.check(model)
    else:
        _require_ranges(model, table, from_table=source is not None)
    _warn_of_unknown(model, table)
    with _undone_on_error(model):
        model.config = config
        if statistics is not None:
            place_without(model, {})
            restore(model, statistics)
        leave_out_problems(model, known=_entries(model, table))
        fix_scales(model, table, group=group)
        set_mode(model, "quantize")


def fix_scales(
    model: WrappedModel,
    table: Mapping[str, TensorRange] | None = None,
    *,
    group: ProcessGroup | None = None,
) -> None:
    """Choose the scale of every quantized tensor, in place.

    Args:
        model: prepared, in ``eval`` mode; observed, except for what ``table`` has.
        table: ranges and scales that come from elsewhere.
        group: the processes that decide together on method "auto".
    """
    table = table or {}
    plan_of(model).methods = {}
    set_constants(model)
    _set_constants_from(model, table)
    given: dict[str, QParams] = {}
    ranges: dict[str, Range] = {}
    for key, entry in _entries(model, table).items():
        qparams = _scale_of(model, key, entry)
        if qparams is None:
            ranges[key] = _range_of(model, key, entry)
        else:
            given[key] = qparams
    ways = {key: w for key, w in ways_of(model).items() if key not in given and key not in ranges}
    ranges |= auto_ranges(model, ways, ranges, given, group)
    set_activations(model, ranges, given, _conversions_in(model, table))
    warn_of_enlarged(model)


# --- a table -------------------------------------------------------------------------------------


def _entries(model: WrappedModel, table: Mapping[str, TensorRange]) -> dict[str, TensorRange]:
    """Return for every watched tensor its entry, if there is one, perhaps that of a moved one."""
    names = {key: [key] for key in watched(model)}
    for key, tensor in plan_of(model).tensors.items():
        if tensor.source in names and key != tensor.source:
            names[tensor.source].append(key)
    found = {key: next((n for n in same if n in table), None) for key, same in names.items()}
    return {key: table[name] for key, name in found.items() if name is not None}


def _conversions_in(model: WrappedModel, table: Mapping[str, TensorRange]) -> dict[str, QParams]:
    """Return for every conversion in a table the scale that it has there, or that suits it."""
    found: dict[str, QParams] = {}
    for _, conversion in plan_of(model).conversions():
        key = conversion.key
        entry = table.get(key)
        if entry is not None and entry.scale is not None:
            found[key] = _qparams_in(table, key, stub_at(model, conversion.points[0]))
        elif entry is not None:
            found[key] = choose_qparams(
                torch.tensor(float(entry.low.min())),
                torch.tensor(float(entry.high.max())),
                conversion.spec,
            )
    return found


def _require_ranges(
    model: WrappedModel, table: Mapping[str, TensorRange], *, from_table: bool
) -> None:
    entries, found = _entries(model, table), watched(model)
    seen = {k for k, s in found.items() if s.observer is not None and s.observer.seen}
    missing = [key for key in found if key not in entries and key not in seen]
    if from_table and missing:
        raise NotCalibratedError(
            f"neither the table nor calibration has seen {len(missing)} of {len(found)} tensors: "
            f"{', '.join(map(repr, missing))}; add them, exclude their nodes, or calibrate first"
        )
    if found and not entries and not seen:
        raise NotCalibratedError(
            "no data ran through the model; run qwrap.calibrate() first, or give a table"
        )


def _warn_of_unknown(model: WrappedModel, table: Mapping[str, TensorRange]) -> None:
    """Warn of entries for what is not in the model; those of float tensors are just not needed."""
    known = model.graph.values.keys() | plan_of(model).scales().keys()
    unknown = [name for name in table if name not in known]
    if unknown:
        warnings.warn(
            f"{len(unknown)} of {len(table)} entries of the table fit no tensor of the model: "
            f"{', '.join(map(repr, unknown))}",
            QwrapWarning,
            stacklevel=3,
        )


def _set_constants_from(model: WrappedModel, table: Mapping[str, TensorRange]) -> None:
    """Give the constants in ``table`` the scales they have there, in place."""
    plan = plan_of(model)
    rows = {tensor.table: key for key, tensor in plan.tensors.items() if tensor.table is not None}
    for point, constant in plan.constants.items():
        names = (constant.value, rows.get(point))
        name = next((n for n in names if n is not None and n in table), None)
        if name is not None and not has_range(constant.override or RangeOverride()):
            stub = stub_at(model, UsePoint(*point))
            stub.set_qparams(_qparams_in(table, name, stub))


def _qparams_in(table: Mapping[str, TensorRange], name: str, stub: Stub) -> QParams:
    try:
        return table[name].qparams(stub.spec, stub.scale.shape)
    except TableError as error:
        raise TableError(f"tensor {name!r}: {error}") from error


def _scale_of(model: WrappedModel, key: str, entry: TensorRange) -> QParams | None:
    """Return the scale of an entry, None if it has none, or one that the tensor cannot have."""
    if entry.scale is None:
        return None
    qparams = _qparams_in({key: entry}, key, stub_at(model, ValuePoint(key)))
    cut = cut_to_bounds(model, key, qparams)
    low, high = bounds_at(model, key)
    reach = span_of(cut, stub_at(model, ValuePoint(key)).grid)
    # An absorbed activation lets nothing through beyond its bounds: such codes are a waste, where
    # another zero point would spare them.
    same = torch.allclose(cut.scale, qparams.scale, rtol=1e-6)
    free = not stub_at(model, ValuePoint(key)).spec.symmetric
    return cut if same and not (free and (reach[0] < low or high < reach[1])) else None


def _range_of(model: WrappedModel, key: str, entry: TensorRange) -> Range:
    low, high = bounds_at(model, key)
    return max(float(entry.low.min()), low), min(float(entry.high.max()), high)


# --- all or nothing ------------------------------------------------------------------------------


@contextmanager
def _undone_on_error(model: WrappedModel) -> Iterator[None]:
    """Compute in ``eval`` mode; if an error is raised, put back what sat on the model, and how."""
    training = [(module, module.training) for module in model.modules()]
    config, plan, decisions = model.config, plan_of(model), decisions_of(model)
    methods = plan.methods
    taps, kernels = {point: model.tap(point) for point in model.attached}, model.kernels
    before = [(stub, stub.observer, _own_tensors(stub)) for _, stub in stubs(model)]
    modes = [(tap, tap.mode) for tap in taps.values() if isinstance(tap, Switch)]
    model.eval()
    try:
        yield
    except BaseException:
        model.attach(taps, kernels)
        model.add_module("quantization", decisions)
        for stub, observer, tensors in before:
            stub.observer = observer
            with torch.no_grad():
                for name, tensor in tensors.items():
                    getattr(stub, name).copy_(tensor)
        for tap, mode in modes:
            tap.mode = mode
        model.config, model.plan, plan.methods = config, plan, methods
        raise
    finally:
        for module, was in training:
            module.training = was


def _own_tensors(stub: Stub) -> dict[str, torch.Tensor]:
    """Return copies of what a stub's scale is made of, by attribute."""
    own = (*stub.named_buffers(recurse=False), *stub.named_parameters(recurse=False))
    return {name: tensor.detach().clone() for name, tensor in own}
