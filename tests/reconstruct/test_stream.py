"""Samples between units are what the whole models make of them, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qwrap
from qwrap.model.batches import iterate
from qwrap.model.points import ValuePoint
from qwrap.quant.auto.held_out import float_model
from qwrap.reconstruct.samples import Samples
from qwrap.reconstruct.stream import Stream
from qwrap.reconstruct.units import Unit, find_units

NODES = """
    a = Conv<pads=[1,1,1,1]>(x, w0, b0) b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w1, b1) d = Add(c, b) e = Relu(d)
    f = Conv<strides=[2,2]>(e, w2) g = Relu(f) y = Conv(g, w3)
"""
SHAPES = {
    "w0": (8, 3, 3, 3),
    "b0": (8,),
    "w1": (8, 8, 3, 3),
    "b1": (8,),
    "w2": (4, 8, 2, 2),
    "w3": (4, 4, 1, 1),
}
PLENTY = 2**30


def prepared(small: Any, source: Any, batches: Any) -> qwrap.WrappedModel:
    del small
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    qwrap.calibrate(model, batches, progress=False)
    return model


class Course:
    """A stream, and the rows that go into it."""

    def __init__(self, small: Any, memory: int, *, both: bool = False, count: int = 6) -> None:
        batches = small.batches(count)
        self.model = prepared(small, small.build(NODES, SHAPES), batches)
        self.reference = float_model(self.model)
        self.units, _ = find_units(self.model, "layer")
        keys = sorted({key for unit in self.units for key in (*unit.alive, *unit.outputs)})
        self.samples = Samples(self.reference, list(iterate(batches, self.model)), keys)
        self.stream = Stream(
            self.model, self.reference, self.units, self.samples, memory, both=both
        )
        self.x = torch.cat([torch.from_numpy(batch) for batch in batches])

    def whole(self, model: qwrap.WrappedModel, key: str) -> Tensor:
        found: list[Tensor] = []
        with torch.no_grad(), model.watching({key: found.append}):
            model(self.x)
        return found[0]

    def given(self, unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
        stream = self.stream
        ids = sorted(stream.learning + stream.deciding)
        batches = list(stream.batches(unit, unit.inputs, ids))
        sides = ([b.quantized for b in batches], [b.floats for b in batches])
        quantized, floats = (torch.cat([values[-1] for values in side]) for side in sides)
        return quantized, floats, torch.cat([b.targets[-1] for b in batches])


def test_samples_are_what_the_whole_models_make_of_them(small: Any) -> None:
    course = Course(small, PLENTY, both=True)
    for unit in course.units:
        course.stream.enter(unit)
        if unit.inputs:
            quantized, floats, targets = course.given(unit)
            key = unit.inputs[-1]
            assert torch.equal(quantized, course.whole(course.model, key))
            assert torch.allclose(floats, course.whole(course.reference, key), rtol=1e-5, atol=1e-6)
            wanted = course.whole(course.reference, unit.outputs[-1])
            assert torch.allclose(targets, wanted, rtol=1e-5, atol=1e-6)
        course.stream.leave(unit)


def test_what_a_unit_has_learned_is_seen_behind_it(small: Any) -> None:
    course = Course(small, PLENTY)
    first, second, *_ = course.units
    course.stream.enter(first)
    with torch.no_grad():
        course.model.stored("b0").add_(0.5)
    course.stream.leave(first)
    course.stream.enter(second)
    assert torch.equal(course.given(second)[0], course.whole(course.model, "b"))


class Counting(nn.Module):
    """Counts rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return x


@pytest.mark.parametrize("memory", [PLENTY, 6 * 2 * 4 * 8 * 64])
def test_no_sample_goes_through_a_unit_twice(small: Any, memory: int) -> None:
    course = Course(small, memory)
    model, counts = course.model, {}
    taps = {point: model.tap(point) for point in model.attached}
    for key in ("a", "c", "f"):
        counts[key] = taps[ValuePoint(key)] = Counting()
    model.attach(taps, model.kernels)
    for unit in course.units:
        course.stream.enter(unit)
        course.stream.leave(unit)
    assert all(count.rows <= 12 for count in counts.values())
    assert counts["a"].rows == 12


def test_large_activations_leave_room_for_few_samples_and_small_ones_for_more(small: Any) -> None:
    course = Course(small, 6 * 2 * 4 * 8 * 64, both=True)  # six samples of one [8, 8, 8] activation
    seen = []
    for unit in course.units:
        course.stream.enter(unit)
        seen.append(len(course.stream.learning + course.stream.deciding))
        if unit.inputs:
            quantized, _, _ = course.given(unit)
            ids = sorted(course.stream.learning + course.stream.deciding)
            whole = course.whole(course.model, unit.inputs[-1])
            assert torch.allclose(quantized, whole[ids], atol=1e-6)
        course.stream.leave(unit)
    # What is alive is b; b and e; e and g; g and y. Three of the twelve left at the second.
    assert seen == [6, 3, 5, 9]
    assert course.stream.notes == ["as few as 3 of 12 samples at a time, for they take much memory"]


# --- samples -------------------------------------------------------------------------------------


def samples(source: Any, batches: list[Any], keys: list[str]) -> Samples:
    model = qwrap.load(source).eval()
    return Samples(model, list(iterate(batches, model)), keys)


def test_batches_fall_into_rows_that_run_together_again(small: Any) -> None:
    found = samples(small.convs(), small.batches(3), ["b"])
    assert len(found.rows) == 6
    assert found.axis("b") == 0
    assert found.sizes == {"b": 6 * 64 * 4}
    assert found.groups(range(6), {}, 4) == [[0, 1, 2, 3], [4, 5]]


def test_a_graph_for_one_batch_size_gets_its_batches_as_they_are(small: Any) -> None:
    nodes = "a = Reshape(x, shape) y = MatMul(a, w)"
    weights = {"shape": np.array([2, 192]), "w": (192, 4)}
    source = small.build(nodes, weights, outputs="float[2,4] y")
    found = samples(source, small.batches(3), ["a"])
    assert len(found.rows) == 3
    assert found.groups(range(3), {}) == [[0], [1], [2]]


def test_a_graph_that_mixes_its_samples_gets_its_batches_as_they_are(small: Any) -> None:
    nodes = "m = ReduceMean<axes=[0]>(x) a = Sub(x, m) y = Conv(a, w)"
    found = samples(small.build(nodes, {"w": (4, 3, 1, 1)}), small.batches(3), ["a"])
    assert len(found.rows) == 3


def test_samples_may_lie_along_another_axis_or_share_a_value(small: Any) -> None:
    nodes = "t = Transpose<perm=[1,0,2]>(x) a = MatMul(t, w) p = Transpose(v) y = Add(a, p)"
    source = small.build(
        nodes, {"w": (4, 4), "v": (4, 1)}, inputs="float[N,S,4] x", outputs="float[S,N,4] y"
    )
    found = samples(source, small.batches(2, (2, 5, 4)), ["a", "p"])
    assert (found.axis("a"), found.axis("p")) == (1, None)
    pieces = found.cut("a", torch.arange(40.0).reshape(5, 2, 4), 2)
    assert pieces[0].shape == (5, 1, 4)
    assert torch.equal(found.join("a", pieces), torch.arange(40.0).reshape(5, 2, 4))


def test_samples_of_several_lengths_run_with_their_like(small: Any) -> None:
    nodes = "a = MatMul(x, w) y = Relu(a)"
    source = small.build(nodes, {"w": (4, 4)}, inputs="float[N,S,4] x", outputs="float[N,S,4] y")
    batches = [small.batches(1, (1, length, 4))[0] for length in (3, 5, 3, 3, 5)]
    found = samples(source, batches, ["a"])
    assert found.groups(range(5), {}) == [[0, 2, 3], [1, 4]]
