"""From a budget to the types of every layer: measure, choose, verify."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
from torch import Tensor
from tqdm import tqdm

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.graph.save import check_target
from qwrap.mixed.choices import CHOICES, Assignment, By, Choice, groups_of
from qwrap.mixed.loss.ranking import Sensitivity
from qwrap.mixed.loss.sensitivity import sensitivity
from qwrap.mixed.search.asked import Along, Asked
from qwrap.mixed.search.budget import Budget
from qwrap.mixed.search.evaluate import Again, Evaluator, Metric
from qwrap.mixed.search.interactions import LossModel
from qwrap.mixed.search.linear import LinearCost
from qwrap.mixed.search.pareto import EVERYWHERE, Explorer, Measured, Point, choose, front_of
from qwrap.mixed.search.prices import Prices
from qwrap.mixed.search.report import SearchResult
from qwrap.mixed.search.state import State
from qwrap.model.batches import iterate
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.statistics.fingerprint import Fingerprint
from qwrap.targets import find_target
from qwrap.train.finetune import finetune as train
from qwrap.train.split import Split, split

SAMPLES = 64
POINTS = 8
TIMINGS = 3  # of the files that may be chosen, each after better predictions


def search(
    model: WrappedModel | onnx.ModelProto | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    budget: Budget | str | None = None,
    max_drop: float | None = None,
    metric: Metric | None = None,
    choices: Iterable[Choice | str] = CHOICES,
    by: By = "layer",
    config: QConfig | None = None,
    along: Along | None = None,
    measure: Literal["kl", "error"] | Mapping[str, str] = "kl",
    method: Literal["measured", "fisher"] = "measured",
    samples: int = SAMPLES,
    held_out: float | Iterable[Any] = 0.25,
    points: int = POINTS,
    threads: int = 0,
    finetune: int | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Choose the types of every layer such that the file is the best one within a budget.

    Each group of nodes is quantized alone in each choice of types, to see what the outputs lose
    by it; what it costs is counted, or timed in onnxruntime, conversions between types included.
    An integer linear programme then finds the assignments that lose least for what they cost. Those
    along the whole front are prepared, calibrated and measured; where they lose more than the sum
    of their groups, losses are corrected and the programme is solved again. The best assignment
    that was measured is chosen.

    ``model`` stays as it is. With the same data, the same assignments are found; but for latency,
    which is measured.

    Args:
        model: a float model.
        batches: as for ``calibrate``: some hundred samples. A part of them is held out.
        budget: the most that the file may cost, as ``Budget`` or its text: "bytes=300 KB",
            "latency=1.1 x uint8/int8", "bytes=50%".
        max_drop: the most that the metric may fall by, or, without a metric, the loss may be: the
            cheapest assignment is chosen. One of the two has to be given; with both, the
            assignment has to meet both.
        metric: called with a model that simulates quantization, in ``eval``; returns a number, more
            is better. Points are compared by it; groups by ``measure`` all the same. By default
            points are compared by the loss on held-out batches.
        choices: types to choose from, as ``Choice`` or its text: "uint8/int8", "float32".
        by: what has one choice: a "layer", "node" or "block", see ``groups_of``.
        config: what else the model is quantized with; what it excludes or has regions for stays so.
        along: the cost that the front runs along, and that ``max_drop`` makes small; by default
            the first one that the budget limits, else "latency" ("bit_ops" where the target is not
            onnxruntime on CPUs, for that is where latency is measured).
        measure: how outputs are compared: "kl" or "error", perhaps by output, as in
            ``sensitivity``.
        method: how the losses of groups are found: "measured" or "fisher", as in ``sensitivity``.
        samples: of the calibration data, to measure the losses of groups on.
        held_out: share of the batches that points are compared on, or other batches.
        points: costs between the lowest and that of no loss at which assignments are looked for.
            With corrections, three to five times as many are evaluated.
        threads: that an operator may use where latency is measured; 0 for onnxruntime's default.
        finetune: steps of training of the chosen model, without labels, as in ``finetune``.
        seed: says which batches are held out, and which assignments are timed.
        resume: a JSON file in which everything that was measured is kept as soon as it is known. A
            search that finds it there goes on from it. What groups lose and take is kept meanwhile
            in files beside it, with ``.sensitivity`` and ``.latency`` in their names.
        progress: show bars on a terminal.

    Raises:
        ConfigError: a setting is wrong or contradicts another one; nothing is within the budget
            (the error says what the nearest budget is) or good enough.
        InputError: a batch does not fit, there are too few, or the metric is not finite.
        StatisticsError: ``resume`` is damaged, or of another search.
        ExportError: ``resume`` cannot be written.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    config = copy.deepcopy(config) if config else QConfig()
    along = _along(along, budget, config)
    asked = Asked(budget=budget, max_drop=max_drop, along=along, points=points)
    _check(measure, samples, finetune)
    _check_timing(asked, config)
    if resume is not None:
        check_target(resume)
    wrapped = _float_model(model)
    offered = [Choice.parse(c) if isinstance(c, str) else c for c in choices]
    groups = groups_of(wrapped, config, offered, by)
    data = _divided(batches, wrapped, held_out, seed)
    calibration, held = Again(lambda: data.epoch(0)), Again(data.held_out)
    settings = {
        "model": _digest(json.dumps(Fingerprint.of(wrapped).to_dict()).encode()),
        "config": _digest(repr(config).encode()),
        "groups": _digest(repr(groups).encode()),
        "data": _digest_of(held),
        "measure": measure if isinstance(measure, str) else dict(measure),
        "method": method,
        "metric": None if metric is None else getattr(metric, "__qualname__", ""),
        "samples": samples,
        "threads": threads,
        "seed": seed,
    }
    state = State(resume, settings)
    prices = Prices(
        wrapped,
        groups,
        config,
        next(iter(held)),
        asked.costs,
        state,
        _beside(resume, "latency"),
        threads=threads,
        seed=seed,
        progress=progress,
    )
    asked.check(prices.costs, groups)

    def analysed() -> Sensitivity:
        return sensitivity(
            wrapped,
            calibration,
            groups=groups,
            config=config,
            method=method,
            measure=measure,
            samples=samples,
            seed=seed,
            resume=_beside(resume, "sensitivity") if method == "measured" else None,
            progress=progress,
        )

    found: Sensitivity = state.step(
        "sensitivity", analysed, read=Sensitivity.from_dict, write=Sensitivity.to_dict
    )
    evaluator = Evaluator(wrapped, groups, config, calibration, held, measure, metric)
    of_float = state.measured("float", evaluator.of_float)
    with tqdm(desc="evaluating", unit="point", disable=None if progress else True) as bar:

        def evaluate(assignment: Assignment) -> Measured:
            bar.update()
            return state.measured(assignment, lambda: evaluator.measure(assignment))

        explorer = Explorer(groups, prices.costs, asked.along, LossModel(found.losses), evaluate)
        alone = LinearCost(name="loss", of=found.losses)
        points_found, chosen = _explored(explorer, alone, prices, asked, of_float)
    result = SearchResult(
        chosen=chosen,
        front=front_of(points_found, asked.along),
        points=points_found,
        groups=groups,
        along=asked.along,
        of_float=of_float,
        asked=asked.text,
        config=config,
        model=evaluator.calibrated(chosen.assignment),
        sensitivity=found,
        costs=prices.costs,
    )
    if finetune is not None and result.model is not None:
        train(result.model, calibration, steps=finetune, held_out=held, progress=progress)
        result.tuned = evaluator.judge(result.model.eval())
    return result


def _explored(
    explorer: Explorer, alone: LinearCost, prices: Prices, asked: Asked, of_float: Measured
) -> tuple[list[Point], Point]:
    """Return the points that were evaluated, and the one that is asked for."""
    accepts = asked.accepts(of_float)
    explorer.ends()
    explorer.lay_out(asked.points)
    _settle(explorer, alone, asked, accepts)
    if prices.is_timed:
        front = front_of(explorer.points, asked.along)
        front += [p for p in explorer.points if p.origin == EVERYWHERE and p not in front]
        seconds = prices.time([point.assignment for point in front])
        prices.learn([(p.assignment, s) for p, s in zip(front, seconds, strict=True)])
        explorer.reprice(prices.costs)
        explorer.lay_out(asked.points, rounds=0)
        _settle(explorer, alone, asked, accepts)
    for _ in range(TIMINGS):
        explorer.points = _timed(explorer, prices, asked, of_float)
        chosen = asked.pick(explorer.points, explorer.costs, explorer.groups, of_float)
        if not prices.is_timed or not _promised_more(explorer, asked, accepts, chosen):
            break
        # It took longer than predicted: predict better, and look again.
        prices.learn([(p.assignment, p.latency) for p in explorer.points if p.latency is not None])
        explorer.reprice(prices.costs)
        with contextlib.suppress(ConfigError):  # by predictions nothing is; what was timed is
            _settle(explorer, alone, asked, accepts)
    return explorer.points, chosen


def _promised_more(
    explorer: Explorer,
    asked: Asked,
    accepts: Callable[[Measured], bool] | None,
    chosen: Point,
) -> bool:
    """Whether predictions had a better point than the chosen one within the budget."""
    limits = asked.limits(explorer.costs, explorer.groups)
    try:
        hoped = choose(explorer.points, asked.along, limits, accepts)
    except ConfigError:
        return False
    return hoped.measured.quality > chosen.measured.quality


def _settle(
    explorer: Explorer,
    alone: LinearCost,
    asked: Asked,
    accepts: Callable[[Measured], bool] | None,
) -> None:
    """Look for the best within the budget, the greedy order's included, in place."""
    limits = asked.limits(explorer.costs, explorer.groups)
    if limits:
        with contextlib.suppress(ConfigError):  # the greedy order may miss what there is
            explorer.greedily(alone, limits)
    explorer.settle(limits)
    if accepts is not None:
        explorer.press(accepts)


def _timed(explorer: Explorer, prices: Prices, asked: Asked, of_float: Measured) -> list[Point]:
    """Return all points; those that are shown, or may be chosen, with the time their files take."""
    points = list(explorer.points)
    if not prices.is_timed:
        return points
    wanted = [p for p in points if p.origin == EVERYWHERE]
    wanted += front_of(points, asked.along)
    wanted += asked.worth_timing(points, explorer.costs, explorer.groups, of_float)
    wanted = [p for p in points if p in wanted]
    seconds = prices.time([point.assignment for point in wanted])
    for point, took in zip(wanted, seconds, strict=True):
        points[points.index(point)] = replace(point, latency=took)
    return points


# --- what is given -------------------------------------------------------------------------------


def _along(along: Along | None, budget: Budget | None, config: QConfig) -> Along:
    if along is not None and along not in get_args(Along):
        raise ConfigError(f"along={along!r}: choose one of {get_args(Along)}")
    limited: list[Along] = [name for name in get_args(Along) if budget and name in budget.asked]
    usual: Along = "latency" if find_target(config.target).is_cpu else "bit_ops"
    return along or (limited[0] if limited else usual)


def _check_timing(asked: Asked, config: QConfig) -> None:
    target = find_target(config.target)
    if "latency" in asked.costs and not target.is_cpu:
        raise ConfigError(
            f"latency is measured in onnxruntime on this CPU, and the target is {target.name!r}: "
            "limit bytes or bit_ops instead"
        )


def _check(measure: object, samples: int, finetune: int | None) -> None:
    if isinstance(measure, str) and measure not in ("kl", "error"):
        raise ConfigError(f"measure={measure!r}: losses have to add up; choose 'kl' or 'error'")
    if samples < 1:
        raise ConfigError(f"samples={samples}: expected 1 or more")
    if finetune is not None and finetune < 1:
        raise ConfigError(f"finetune={finetune}: expected 1 step or more")


def _float_model(model: WrappedModel | onnx.ModelProto | str | os.PathLike[str]) -> WrappedModel:
    if not isinstance(model, WrappedModel):
        return load(model).eval()
    if model.plan is not None or model.origin is not None:
        raise ConfigError(
            "the model is prepared or quantized already; search takes the float model: load it "
            "again, and give what else is to be quantized as config="
        )
    return copy.deepcopy(model).eval()


def _divided(
    batches: Iterable[Any], model: WrappedModel, held_out: float | Iterable[Any], seed: int
) -> Split:
    """Return calibration and held-out data; what can be read once is kept in memory."""
    if isinstance(held_out, (int, float)) and not held_out > 0:
        raise ConfigError(f"held_out={held_out}: points are compared on held-out batches")
    if isinstance(batches, Iterator) or hasattr(batches, "get_next"):
        batches = list(iterate(batches, model))
    return split(batches, model, held_out, seed)


def _beside(path: str | os.PathLike[str] | None, kind: str) -> Path | None:
    if path is None:
        return None
    path = Path(path)
    return path.with_name(f"{path.stem}.{kind}{path.suffix or '.json'}")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of(batches: Iterable[Mapping[str, Any]]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for inputs in batches:
        for name, value in inputs.items():
            found.update(name.encode())
            array = value.cpu().numpy() if isinstance(value, Tensor) else value
            found.update(repr(array).encode() if isinstance(array, list) else array.tobytes())
    return found.hexdigest()
