"""How much quantizing one layer, node, Block or tensor hurts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from qwrap.config import QConfig
from qwrap.errors import ConfigError, InputError
from qwrap.graph.load import Source
from qwrap.graph.save import check_target
from qwrap.mixed.choices import CHOICES, FLOAT, Choice, Group, groups_of
from qwrap.mixed.loss.analysis import Analysis, parts_of_groups, parts_of_tensors
from qwrap.mixed.loss.carriers import as_prepared, calibrated, configs_of, own_choice
from qwrap.mixed.loss.measured import Metric
from qwrap.mixed.loss.outputs import MEASURES, Measure, check_measure
from qwrap.mixed.loss.ranking import Sensitivity
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.samples import Samples
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import config_of

By = Literal["layer", "node", "block", "tensor"]
Method = Literal["measured", "fisher"]
Rest = Literal["float", "quantized"]

SAMPLES = 64
ROOM = 2**28  # bytes of samples in memory


def sensitivity(
    model: WrappedModel | Source,
    batches: Iterable[Any],
    *,
    by: By = "layer",
    groups: Sequence[Group] | None = None,
    choices: Iterable[Choice | str] | None = None,
    config: QConfig | None = None,
    method: Method = "measured",
    measure: Measure | Mapping[str, str] | None = None,
    metric: Metric | None = None,
    rest: Rest = "float",
    samples: int = SAMPLES,
    projections: int = 4,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Return how much the outputs of ``model`` suffer when one part of it alone is quantized.

    ``model`` stays as it is: copies are prepared and calibrated once for each choice of types,
    and their parts are then switched on one after another. "measured" runs the samples for each
    of them, from where they first differ from the float model. "fisher" estimates the same losses
    to second order, for all parts and choices from the same few backward passes (see
    ``qwrap.mixed.loss.fisher``), so that many parts and choices cost little more than few. It is
    right to some tens of percent where losses are small.

    Args:
        model: prepared and calibrated, or float; or what ``qwrap.load`` takes.
        batches: as for ``calibrate``. All are calibrated with; the first ``samples`` are measured.
        by: what is quantized at a time: "layer", "node" or "block" as in ``groups_of``, with the
            weights of its nodes and the tensors they read and make; or a single "tensor" with a
            scale of its own, weight (with the bias that goes with it) or activation.
        groups: what is quantized at a time instead, with the choices that they have.
        choices: types to quantize with, as "uint8/int8" or ``Choice``. By default those of a
            prepared model, with the scales it has, and with its regions, which are listed under
            the types of the model at large; else ``CHOICES``.
        config: what else the model is to be quantized with, where ``choices`` are given or it is
            float; by default what it was prepared with.
        method: "measured" or "fisher".
        measure: "kl": the Kullback-Leibler divergence of the softmax for outputs that are scores
            of classes, as far as the graph tells, and "error" for others. "error": squared error
            over the float output's squares. "sqnr": the same in dB, as noise over signal. By
            output name, "kl" or "error", for the outputs that count. "metric": what ``metric``
            falls by. By default "metric" where there is one, else "kl". Outputs that are no floats
            count by the share of elements that differ.
        metric: called with a model that simulates quantization; returns a number, more is better.
        rest: "float", or "quantized": all else is, and the loss is what leaving the one part in
            float wins. It may be negative.
        samples: how many to measure on, of up to 256 MiB.
        projections: random directions for each sample in which "fisher" looks at the outputs.
        seed: of those.
        resume: a file to which what was measured is written as it comes, and from which it is
            taken up if it exists. Only for "measured".
        progress: show bars on a terminal.

    Raises:
        ConfigError: a setting is wrong, a group names an unknown node, or nothing is quantized.
        InputError: there is no batch, one does not fit, or outputs or the metric become NaN.
        NotCalibratedError: the model is prepared but not calibrated, and no choices are given.
        StatisticsError: ``resume`` is of another analysis.
        ExportError: ``resume`` cannot be written.
    """
    if measure is None:
        measure = "kl" if metric is None else "metric"
    _check_names(by, method, rest, measure)
    _check_together(method, measure, metric, rest, resume)
    if samples < 1 or projections < 1:
        raise ConfigError(f"samples={samples}, projections={projections}: expected 1 or more")
    if not isinstance(model, WrappedModel):
        model = load(model).eval()
    is_prepared = isinstance(model.plan, QuantPlan)
    is_own = is_prepared and choices is None and groups is None
    base = config or (config_of(model) if is_prepared else QConfig())
    check_measure(model.graph, measure)
    if groups is not None:
        _check_groups(model, groups)
    wanted = _wanted(model, choices, groups)
    kept = Samples(samples, ROOM)
    found = groups
    if found is None:
        each = "node" if by == "tensor" else by
        # what regions speak of is settled, but in a model as it is it hurts like the rest
        asked = replace(base, regions=[], tensors={}) if is_own else base
        found = groups_of(model, asked, (*wanted, FLOAT), each)
    if is_own:
        carriers = [as_prepared(model, batches, kept)]
    else:
        configs = configs_of(base, found, wanted)
        carriers = calibrated(model, configs, batches, kept, progress=progress)
    if not kept.batches:
        raise InputError(f"the first batch alone has more than {ROOM >> 20} MiB; give smaller ones")
    if by == "tensor" and groups is None:
        parts = parts_of_tensors(carriers)
    else:
        parts = parts_of_groups(carriers, found, drop_empty=is_own, with_others=rest == "quantized")
    analysis = Analysis(
        carriers=carriers,
        parts=parts,
        by=by if groups is None else "groups",
        samples=kept,
        measure=measure,
        rest=rest,
    )
    if method == "fisher":
        return analysis.fisher(projections, seed, progress=progress)
    return analysis.measured(metric, resume, progress=progress)


# --- what is asked for ---------------------------------------------------------------------------


def _check_names(by: str, method: str, rest: str, measure: object) -> None:
    for name, value, known in (
        ("by", by, get_args(By)),
        ("method", method, get_args(Method)),
        ("rest", rest, get_args(Rest)),
        ("measure", measure, MEASURES),
    ):
        if value not in known and not isinstance(value, Mapping):
            raise ConfigError(f"{name}={value!r}: choose one of {known}")


def _check_together(
    method: str, measure: object, metric: object, rest: str, resume: str | os.PathLike[str] | None
) -> None:
    """Refuse settings that contradict each other."""
    if (measure == "metric") != (metric is not None):
        raise ConfigError("measure='metric' and metric= go together")
    if method == "fisher":
        asked = {
            "metric": metric is not None,
            "rest='quantized'": rest != "float",
            "resume": resume is not None,
        }
        if wrong := [name for name, is_set in asked.items() if is_set]:
            raise ConfigError(f"method='fisher' knows no {', '.join(wrong)}; use 'measured'")
    if resume is not None:
        check_target(resume)


def _wanted(
    model: WrappedModel,
    choices: Iterable[Choice | str] | None,
    groups: Sequence[Group] | None,
) -> list[Choice]:
    """Return the choices to look at, float32 left out.

    Raises:
        ConfigError: there are none.
    """
    if choices is not None:
        given = [Choice.parse(c) if isinstance(c, str) else c for c in choices]
    elif groups is not None:
        given = [choice for group in groups for choice in group.choices]
    elif isinstance(model.plan, QuantPlan):
        given = [own_choice(model)]
    else:
        given = list(CHOICES)
    wanted = [choice for choice in dict.fromkeys(given) if choice != FLOAT]
    if not wanted:
        raise ConfigError("choices: give one or more that quantize something, as 'uint8/int8'")
    return wanted


def _check_groups(model: WrappedModel, groups: Sequence[Group]) -> None:
    names = [group.name for group in groups]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"groups: two are called {twice[0]!r}")
    if not names or "" in names:
        raise ConfigError("groups: give one or more, each with a name")
    known = list(model.graph.nodes)
    for group in groups:
        for key in group.nodes:
            if key not in model.graph.nodes:
                nearest = difflib.get_close_matches(key, known, 3, cutoff=0.0)
                hint = ", ".join(map(repr, nearest))
                raise ConfigError(f"group {group.name!r}: no node {key!r}; the nearest are {hint}")
