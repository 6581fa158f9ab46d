"""The costs that a search goes by: counted ones, and latency, which is measured and learned."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwrap.config import QConfig
from qwrap.mixed.choices import Assignment, Group
from qwrap.mixed.cost.cost import bit_ops_of, bytes_of, rest_bytes
from qwrap.mixed.cost.latency import LatencyTable, measured_latencies
from qwrap.mixed.search.linear import LinearCost
from qwrap.mixed.search.state import State, cost_from_json, cost_to_json
from qwrap.model.wrapped import WrappedModel

LATENCY = "latency"


class Prices:
    """What assignments of one model cost.

    Args:
        model: float; unchanged.
        groups: what assignments choose for.
        config: what else it is quantized with.
        inputs: a batch of the shapes that costs are wanted for.
        names: of the costs that are wanted.
        state: keeps what was found.
        beside: where the table of latencies is kept meanwhile, None for nowhere.
        threads: that an operator may use where latency is measured.
        seed: says which assignments are timed.
        progress: show bars on a terminal.

    Attributes:
        costs: by name.
    """

    def __init__(
        self,
        model: WrappedModel,
        groups: Sequence[Group],
        config: QConfig,
        inputs: Mapping[str, Any],
        names: Iterable[str],
        state: State,
        beside: Path | None,
        *,
        threads: int,
        seed: int,
        progress: bool,
    ) -> None:
        self._model, self._groups, self._config, self._inputs = model, groups, config, inputs
        self._state, self._beside = state, beside
        self._threads, self._seed, self._progress = threads, seed, progress
        self._table: LatencyTable | None = None
        makers = {"bytes": self._bytes, "bit_ops": self._bit_ops}
        self.costs: dict[str, LinearCost] = {}
        for name in dict.fromkeys(names):
            if name == LATENCY:
                self._table = self._measured()
                self.costs[name] = _latency(self._table)
            else:
                self.costs[name] = state.step(
                    name, makers[name], read=cost_from_json, write=cost_to_json
                )

    @property
    def is_timed(self) -> bool:
        """Whether latency is among the costs."""
        return self._table is not None

    def time(self, assignments: Sequence[Assignment]) -> list[float]:
        """Return the seconds that the files of assignments take, timed in turns."""
        listed = [{name: str(c) for name, c in a.items()} for a in assignments]

        def do() -> list[float]:
            return measured_latencies(
                self._model,
                self._groups,
                assignments,
                self._inputs,
                config=self._config,
                threads=self._threads,
                progress=self._progress,
            )

        found: list[float] = self._state.step(f"timed {listed}", do, read=_numbers)
        return found

    def learn(self, timed: Sequence[tuple[Assignment, float]]) -> None:
        """Let predicted latencies fit files that were timed, in place."""
        assert self._table is not None
        self._table = self._table.learn(timed)
        self.costs = {**self.costs, LATENCY: _latency(self._table)}

    def _bytes(self) -> LinearCost:
        own = bytes_of(self._model, self._groups, self._config)
        rest = rest_bytes(self._model, self._groups, self._config)
        return LinearCost(name="bytes", of=own, fixed=rest)

    def _bit_ops(self) -> LinearCost:
        own = bit_ops_of(self._model, self._groups, self._inputs, self._config)
        return LinearCost(name="bit_ops", of=own)

    def _measured(self) -> LatencyTable:
        if self._beside is None:
            return self._measure()
        path = self._beside

        def do() -> LatencyTable:
            table = self._measure()
            table.save(path)
            return table

        def read(_: object) -> LatencyTable:
            return LatencyTable.load(path)

        table = self._state.step(LATENCY, do, read=read, write=lambda _: os.fspath(path.name))
        assert isinstance(table, LatencyTable)
        return table

    def _measure(self) -> LatencyTable:
        return LatencyTable.measure(
            self._model,
            self._groups,
            self._inputs,
            config=self._config,
            threads=self._threads,
            seed=self._seed,
            progress=self._progress,
        )


def _latency(table: LatencyTable) -> LinearCost:
    return LinearCost(name=LATENCY, of=table.seconds, edges=table.edges, fixed=table.constant)


def _numbers(content: Any) -> list[float]:
    return [float(x) for x in content]
