"""Predicted against measured latency of mixed-precision files of the shared models.

    python scripts/bench_latency.py resnet20_cifar10 minilm_l6 --threads 1

A table of latencies is measured for each model, then other assignments are predicted and timed in
turns: each choice everywhere, random mixtures, and a front of mixtures that are the fastest for
their number of groups in the dearer choices, as a search under a budget finds them. Half of the
front teaches the table (``LatencyTable.learn``); the other half is predicted before and after.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from shared_models import SharedModels, default_folder

import qwrap
from qwrap.mixed.choices import CHOICES, Choice, Group, everywhere, groups_of
from qwrap.mixed.cost.cost import all_choices
from qwrap.mixed.cost.latency import MIXES, LatencyTable, measured_latencies
from qwrap.mixed.cost.samples import random_assignments
from qwrap.mixed.search.linear import Limit, LinearCost
from qwrap.mixed.search.solve import solve

_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)  # of the way from the fastest to the dearest


@dataclass(frozen=True)
class Errors:
    """Predicted against measured: ratios less 1, after the same for the drift between the two."""

    model: str
    kind: str
    milliseconds: list[float]
    predicted: list[float]
    drift: float
    errors: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        """One line."""
        off = [abs(error) for error in self.errors]
        shown = " ".join(f"{error:+.0%}" for error in self.errors)
        return (
            f"{self.model:26s} {self.kind:22s} mean {statistics.fmean(off):5.1%}, "
            f"worst {max(off):5.1%}   {shown}"
        )


def front(groups: Sequence[Group], table: LatencyTable, seed: int) -> list[dict[str, Choice]]:
    """Assignments of least loss under budgets of latency, for made-up losses.

    A group loses more with fewer bits, and groups differ by a factor as those of real networks do.
    """
    rng = np.random.default_rng(seed)
    weight = {group.name: float(rng.lognormal(0.0, 1.5)) for group in groups}
    bits = {"uint8": 1.0, "uint16": 0.05, "float32": 0.0}
    loss = LinearCost(
        name="loss",
        of={(g.name, c): weight[g.name] * bits[c.activation] for g in groups for c in g.choices},
    )
    cost = LinearCost(name="latency", of=table.seconds, edges=table.edges, fixed=table.constant)
    fastest = solve(groups, cost)
    dearest = solve(groups, loss)
    low, high = table.predict(fastest), table.predict(dearest)
    budgets = [low + share * (high - low) for share in _SHARES]
    return [dict(solve(groups, loss, [Limit(cost, budget)])) for budget in budgets]


def measure(shared: SharedModels, name: str, arguments: argparse.Namespace) -> Iterable[Errors]:
    """Yield the errors of one model by kind of assignment."""
    model = qwrap.load(shared.path(name)).eval()
    inputs = shared.calibration(name, 1)[0]
    groups = groups_of(model, choices=arguments.choices)
    settings: dict[str, Any] = {"threads": arguments.threads, "rounds": arguments.rounds}
    table = LatencyTable.measure(
        model, groups, inputs, mixes=arguments.mixes, seed=arguments.seed, **settings
    )
    print(
        f"{name}: {len(groups)} groups, {len(table.edges)} tensors between them, measured in "
        f"{table.took:.0f} s",
        file=sys.stderr,
    )
    ends = [everywhere(groups, choice) for choice in all_choices(groups)]
    mixes = random_assignments(groups, arguments.random, arguments.seed + 1000)
    chosen = front(groups, table, arguments.seed)
    seconds = measured_latencies(model, groups, [*ends, *mixes, *chosen], inputs, **settings)
    drift = _drift(table, ends, seconds[: len(ends)])
    timed = iter(seconds)
    kinds = {"one choice": ends, "random": mixes, "front": chosen}
    by_kind = {kind: [(mix, next(timed)) for mix in some] for kind, some in kinds.items()}
    for kind, pairs in by_kind.items():
        yield _errors(name, kind, table, pairs, drift)
    points = by_kind["front"]
    learned = table.learn([(mix, took / drift) for mix, took in points[::2]])
    yield _errors(name, "front, half learned", learned, points[1::2], drift)


def _drift(
    table: LatencyTable, mixes: Sequence[Mapping[str, Choice]], seconds: Sequence[float]
) -> float:
    """How much slower the machine is now than while the table was measured."""
    before = {tuple(sorted(mix.items())): took for mix, took in table.timed}
    pairs = zip(mixes, seconds, strict=True)
    return statistics.median(took / before[tuple(sorted(mix.items()))] for mix, took in pairs)


def _errors(
    name: str,
    kind: str,
    table: LatencyTable,
    pairs: Sequence[tuple[Mapping[str, Choice], float]],
    drift: float,
) -> Errors:
    predicted = [table.predict(mix) for mix, _ in pairs]
    measured = [took for _, took in pairs]
    errors = [p * drift / took - 1 for p, took in zip(predicted, measured, strict=True)]
    return Errors(
        name, kind, [1e3 * t for t in measured], [1e3 * p for p in predicted], drift, errors
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of models; all by default")
    parser.add_argument("--choices", nargs="+", type=Choice.parse, default=CHOICES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mixes", type=int, default=MIXES, help="random files behind the table")
    parser.add_argument("--random", type=int, default=6, help="random files to predict")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=default_folder())
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    shared = SharedModels(arguments.shared)
    done: list[Errors] = []
    for name in arguments.models or shared.names:
        for found in measure(shared, name, arguments):
            done.append(found)
            print(f"{found.text}   drift {found.drift:.2f}", flush=True)
            if arguments.json:
                text = json.dumps([asdict(each) for each in done], indent=1)
                arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
