"""Files of latencies that are damaged, foreign, or of another model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qwrap
from qwrap.errors import ExportError, TableError
from qwrap.mixed.choices import FLOAT, Choice, Edge, Group
from qwrap.mixed.cost.latency import LatencyTable
from qwrap.mixed.cost.origin import Origin, cpu_name

U8 = Choice("uint8", "int8")
ORIGIN = Origin(
    model="m", groups="g", shapes={"x": [1, 3]}, onnxruntime="1", threads=1, cpu="c", cores=2
)
TABLE = LatencyTable(
    {("a", U8): 1e-3, ("a", FLOAT): 0.1 + 0.2, ("b", FLOAT): 2.0},
    [Edge("t", "a", ("b", None), {("uint8", "float32"): 1e-7})],
    1e-6,
    ORIGIN,
    [({"a": U8, "b": FLOAT}, 0.5)],
    3.5,
)


def test_every_digit_comes_back(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json") == TABLE


def changed(path: Path, change: Any) -> Path:
    TABLE.save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "is no table of latencies"),
        (lambda d: d.update(version=2), "is of version 2; this qwrap reads 1"),
        (lambda d: d.update(constant=-1.0), "constant: expected seconds, got -1.0"),
        (lambda d: d.update(constant=True), "constant: expected seconds, got True"),
        (lambda d: d["groups"]["a"].update({"uint8/int8": None}), "group 'a': expected seconds"),
        (lambda d: d["groups"]["a"].update({"uint8": 1.0}), "give the types of activations and"),
        (lambda d: d.update(groups=[]), "groups: expected an object, got list"),
        (lambda d: d["edges"][0].update(producer="z"), "edge 't': there is no group 'z'"),
        (lambda d: d["edges"][0].update(costs=[["uint8", 1]]), r"expected \[type, type, seconds\]"),
        (lambda d: d["edges"][0].update(tensor=3), "expected a text, got 3"),
        (lambda d: d.update(edges={}), "edges: expected a list"),
        (lambda d: d["origin"].pop("cpu"), "origin: expected the entries"),
        (lambda d: d["origin"].update(threads="1"), "origin: threads is '1', expected int"),
        (lambda d: d["origin"].update(shapes={"x": 3}), "shapes have to be lists"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TableError, match=message):
        LatencyTable.load(changed(tmp_path / "t.json", change))


def test_what_is_no_file_and_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read"):
        LatencyTable.load(tmp_path / "missing.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(TableError, match="is no JSON text"):
        LatencyTable.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match="is no JSON text"):
        LatencyTable.load(tmp_path / "t.json")
    with pytest.raises(ExportError, match="does not exist"):
        TABLE.save(tmp_path / "missing" / "t.json")


def test_an_origin_tells_models_groups_shapes_and_threads_apart(small: Any) -> None:
    model = qwrap.load(small.convs())
    groups = [Group("/a", ("/a", "/b"), (U8, FLOAT))]
    x = small.batches(1)[0]
    here = Origin.here(model, groups, {"x": x}, 1)
    assert here.difference(Origin.here(model, groups, {"x": x}, 1)) is None
    assert here.cpu == cpu_name() != ""
    others = [
        Origin.here(qwrap.load(small.convs(opset=17)), groups, {"x": x}, 1),
        Origin.here(model, [Group("/a", ("/a",), (U8, FLOAT))], {"x": x}, 1),
        Origin.here(model, groups, {"x": x[:1]}, 1),
        Origin.here(model, groups, {"x": x}, 2),
        replace(here, cpu="another"),
    ]
    named = [(here.difference(other) or "").split()[0] for other in others]
    assert named == ["model", "groups", "shapes", "threads", "cpu"]


def test_trained_weights_leave_the_origin_as_it_was(small: Any) -> None:
    model = qwrap.load(small.convs())
    groups = [Group("/a", ("/a",), (U8, FLOAT))]
    before = Origin.here(model, groups, {}, 1)
    for parameter in model.parameters():
        parameter.data += 1.0
    assert Origin.here(model, groups, {}, 1) == before
