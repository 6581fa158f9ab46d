"""Measured latencies, and what they predict."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.mixed.choices import FLOAT, Choice, Group, everywhere, groups_of
from qwrap.mixed.cost.latency import LatencyTable, measured_latencies

U8, U16 = Choice("uint8", "int8"), Choice("uint16", "int8")
NODES = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    a = Add(c2, r1)
    y = Conv(a, w3)
"""
WEIGHTS = {"w1": (32, 3, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "w3": (8, 32, 1, 1)}
X = {"x": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)}
Setting = tuple[qwrap.WrappedModel, list[Group], LatencyTable]


@pytest.fixture(scope="module")
def setting(small: Any) -> Setting:
    model = qwrap.load(small.build(NODES, WEIGHTS, "float[1,3,H,W] x", "float[1,8,H,W] y"))
    groups = groups_of(model, choices=(U8, U16, FLOAT))
    table = LatencyTable.measure(model, groups, X, threads=1, mixes=2, rounds=2, progress=False)
    return model, groups, table


def test_every_choice_and_conversion_has_a_time(setting: Setting) -> None:
    _, groups, table = setting
    assert set(table.seconds) == {(g.name, c) for g in groups for c in g.choices}
    assert min(table.seconds.values()) >= 0
    edges = {edge.tensor: edge for edge in table.edges}
    assert (edges["r1"].producer, edges["r1"].consumers) == ("/c1", ("/c2",))
    assert edges["x"].producer is None
    assert edges["y"].consumers == (None,)
    types = ("uint8", "uint16", "float32")
    assert set(edges["r1"].costs) == {(a, b) for a in types for b in types if a != b}
    assert set(edges["x"].costs) == {("float32", "uint8"), ("float32", "uint16")}


def test_a_prediction_is_a_sum_over_groups_and_conversions(setting: Setting) -> None:
    _, _, table = setting
    mix = {"/c1": U8, "/c2": FLOAT, "/y": U16}
    costs = {edge.tensor: edge.costs for edge in table.edges}
    parts = [table.constant, *(table.seconds[item] for item in mix.items())]
    parts += [costs["x"]["float32", "uint8"], costs["r1"]["uint8", "float32"]]
    parts += [costs["a"]["float32", "uint16"], costs["y"]["uint16", "float32"]]
    assert table.predict(mix) == pytest.approx(sum(parts), rel=1e-12)  # another order of adding


def test_what_was_timed_is_predicted(setting: Setting) -> None:
    _, groups, table = setting
    timed = [mix for mix, _ in table.timed]
    assert timed[:3] == [everywhere(groups, choice) for choice in (U8, U16, FLOAT)]
    assert len(timed) > 3
    for mix, seconds in table.timed:
        # Far more than on a machine at rest: five files, timed for a tenth of a second in all.
        assert table.predict(mix) == pytest.approx(seconds, rel=0.3)
    assert table.took > 0


def test_float_and_16_bits_cost_more_than_integer_kernels(setting: Setting) -> None:
    model, groups, table = setting
    mixes = [everywhere(groups, choice) for choice in (U8, U16, FLOAT)]
    predicted = [table.predict(mix) for mix in mixes]
    measured = measured_latencies(model, groups, mixes, X, threads=1, rounds=2, progress=False)
    assert np.argmax(predicted) == np.argmax(measured) == 1  # 16 bits compute in float, with pairs


def test_a_table_learns_from_files_timed_since(setting: Setting) -> None:
    _, groups, table = setting
    mix = everywhere(groups, U8)
    slower = 1.2 * table.predict(mix)
    learned = table.learn([(mix, slower)])
    assert abs(learned.predict(mix) - slower) < abs(table.predict(mix) - slower) / 2
    assert learned.timed == [*table.timed, (mix, slower)]


def test_a_saved_table_is_the_same_when_loaded(setting: Setting, tmp_path: Path) -> None:
    _, _, table = setting
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert LatencyTable.load(tmp_path / "table.json").origin.difference(table.origin) is None


def test_an_estimate_needs_no_clock_and_ranks_choices(setting: Setting) -> None:
    model, groups, _ = setting
    table = LatencyTable.estimate(model, groups, X)
    seconds = {c: table.predict(everywhere(groups, c)) for c in (U8, U16, FLOAT)}
    assert seconds[U8] < seconds[FLOAT] < seconds[U16]
    assert table.timed == []
    assert LatencyTable.estimate(model, groups, X) == table


def test_wrong_inputs_and_assignments_are_refused_before_anything_is_timed(
    setting: Setting,
) -> None:
    model, groups, _ = setting
    with pytest.raises(InputError, match=r"the graph has \['x'\]"):
        LatencyTable.measure(model, groups, {"z": X["x"]}, progress=False)
    with pytest.raises(InputError, match="give one batch"):
        LatencyTable.measure(model, groups, [X["x"]], progress=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no group '/z'"):
        measured_latencies(model, groups, [{"/z": U8}], X, progress=False)
