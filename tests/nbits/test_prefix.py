"""A graph that runs part by part gives what it gives as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qwrap
from qwrap.model.batches import iterate
from qwrap.model.points import UsePoint
from qwrap.nbits.cuts import Cuts
from qwrap.nbits.prefix import Prefix
from qwrap.nbits.shelf import Shelf

NODES = """
    a = MatMul(x, w) b = Tanh(a) c = Add(b, x) s = Shape(c) d = Reshape(c, s)
    e = MatMul(d, v) f = Add(e, b) y = Relu(f)
"""


def loaded(small: Any) -> tuple[qwrap.WrappedModel, list[dict[str, Any]]]:
    source = small.build(NODES, {"w": (8, 8), "v": (8, 8)}, "float[N,8] x", "float[N,8] y")
    model = qwrap.load(source).eval()
    return model, list(iterate(small.batches(3, (4, 8)), model))


@pytest.mark.parametrize("memory", [None, 0, 300])
@pytest.mark.parametrize("places", [[1], [3, 5], [1, 2, 3, 4, 5, 6, 7], [7]])
def test_tensors_are_the_same_wherever_it_is_cut(
    small: Any, places: list[int], memory: int | None
) -> None:
    model, batches = loaded(small)
    prefix = Prefix(model, Cuts(model.graph), batches, memory)
    for place in places:
        prefix.advance(place)
    found = [seen["f"] for seen in prefix.look(["f"], 7)]
    wanted: list[torch.Tensor] = []
    with model.watching({"f": wanted.append}), torch.no_grad():
        for batch in batches:
            model(**batch)
    assert [len(each) for each in found] == [1, 1, 1]
    assert all(torch.equal(each[0], w) for each, w in zip(found, wanted, strict=True))


def test_only_what_is_read_later_crosses_a_cut(small: Any) -> None:
    model, _ = loaded(small)
    cuts = Cuts(model.graph)
    assert [sorted(cuts.crossing(place)) for place in range(9)] == [
        ["x"], ["a", "x"], ["b", "x"], ["b", "c"], ["b", "c", "s"], ["b", "d"], ["b", "e"], ["f"],
        [],
    ]  # fmt: skip


def test_a_node_reads_what_is_fixed_for_it_and_no_other(small: Any) -> None:
    model, batches = loaded(small)
    prefix = Prefix(model, Cuts(model.graph), batches)
    prefix.advance(5)
    prefix.fixed[UsePoint("/e", 1)] = lambda: torch.zeros(8, 8)
    (first, *_), (before, *_) = prefix.look(["f"], 7), prefix.look(["b"], 7)
    assert torch.equal(first["f"][0], before["b"][0])


def test_files_go_with_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shelf = Shelf(memory=100)
    values = [torch.arange(20.0) + i for i in range(3)]
    for i, value in enumerate(values):
        shelf.put(i, "x", value)
    assert len(list(tmp_path.glob("qwrap-*/*"))) == 2
    assert all(torch.equal(shelf.get(i, "x"), value) for i, value in enumerate(values))
    shelf.drop(1, "x")
    assert len(list(tmp_path.glob("qwrap-*/*"))) == 1
    del shelf
    assert not list(tmp_path.iterdir())
