"""Float prefixes that are run once for many trials."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qwrap
from qwrap.mixed.choices import Choice
from qwrap.mixed.loss import measured
from qwrap.mixed.loss.carriers import Carrier
from qwrap.mixed.loss.prefixes import Prefixes, choose_cuts
from qwrap.model.points import UsePoint, ValuePoint

U8 = Choice("uint8", "int8")
# Branches, a residual connection, computed sizes, an early output, and two outputs of one node.
BRANCHED = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    early = GlobalAveragePool(r1)
    s, t = Split<axis=1>(r1)
    c2 = Conv<pads=[1,1,1,1]>(s, w2)
    c3 = Conv<pads=[1,1,1,1]>(t, w2)
    k = Concat<axis=1>(c2, c3)
    a = Add(k, r1)
    n = Shape(r1)
    n0 = Gather<axis=0>(n, zero)
    m1 = Constant<value = int64[1] {-1}>()
    shape = Concat<axis=0>(n0, m1)
    f = Reshape(a, shape)
    y = Gemm(f, w3, b3)
"""


def branched(small: Any) -> onnx.ModelProto:
    weights = {
        "w1": (8, 3, 3, 3), "b1": (8,), "w2": (4, 4, 3, 3), "w3": (512, 5), "b3": (5,),
        "zero": np.zeros(1, np.int64),
    }  # fmt: skip
    return small.build(BRANCHED, weights, outputs="float[N,M] y, float[N,C,1,1] early")


def carrier(small: Any) -> Carrier:
    model = qwrap.load(branched(small)).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    qwrap.calibrate(model, small.batches(), progress=False)
    return Carrier(U8, model)


@torch.no_grad()
def test_at_every_cut_what_is_behind_it_computes_the_same(small: Any) -> None:
    made = carrier(small)
    prefixes, x = Prefixes(made), torch.from_numpy(small.batches(1)[0])
    for cut in range(len(prefixes.nodes) + 1):
        behind = [p for p in made.points if prefixes.start([p]) >= cut]
        made.switch(behind)
        wanted = made.model(x)
        made.switch(())
        kept: dict[str, Any] = {}
        with prefixes.keeping([cut], kept):
            made.model(x)
        made.switch(behind)
        with prefixes.skipping(cut, kept):
            found = made.model(x)
        made.switch(())
        assert all(map(torch.equal, found, wanted)), prefixes.nodes[:cut]


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nodes_in_front_of_a_cut_are_not_computed(small: Any) -> None:
    made = carrier(small)
    prefixes, x = Prefixes(made), torch.from_numpy(small.batches(1)[0])
    kept: dict[str, Any] = {}
    cut = prefixes.nodes.index("/c2")
    with prefixes.keeping([cut], kept), Convolutions() as before:
        made.model(x)
    with prefixes.skipping(cut, kept), Convolutions() as behind:
        made.model(x)
    assert (before.count, behind.count) == (3, 2)


def test_a_stub_changes_what_reads_its_tensor_and_nothing_before(small: Any) -> None:
    prefixes = Prefixes(carrier(small))
    order = prefixes.nodes.index
    assert prefixes.start([ValuePoint("x")]) == order("/c1")
    assert prefixes.start([ValuePoint("a")]) == order("/f")
    assert prefixes.start([UsePoint("/c3", 1), UsePoint("/y", 1)]) == order("/c3")
    readers = min(order("/early"), order("/s") if "/s" in prefixes.nodes else order("/c2"))
    assert prefixes.start([ValuePoint("r1")]) <= readers


@pytest.mark.parametrize("rest", ["float", "quantized"])
def test_losses_are_the_same_without_cuts(
    small: Any, monkeypatch: pytest.MonkeyPatch, rest: Any
) -> None:
    monkeypatch.setattr("qwrap.mixed.loss.prefixes.WORTH", 1)
    settings: dict[str, Any] = {"by": "tensor", "rest": rest, "choices": [U8], "progress": False}
    model, batches = qwrap.load(branched(small)), small.batches(3, (8, 3, 8, 8))
    found = qwrap.sensitivity(model, batches, **settings)
    monkeypatch.setattr(measured, "choose_cuts", lambda _: [0])
    assert qwrap.sensitivity(model, batches, **settings) == found


def test_cuts_divide_the_trials_evenly() -> None:
    assert choose_cuts(range(64)) == [0, 8, 16, 24, 32, 40, 48, 56]
    assert choose_cuts([5] * 64) == [0, 5]
    assert choose_cuts([0, 1, 2]) == [0]  # too few trials


def test_a_model_with_branches_in_it_is_cut_in_front_of_them_at_most(small: Any) -> None:
    proto = small.build(
        """
        c = Conv(x, w)
        big = Greater(size, half)
        i = If(big) <
            then_branch = g1 () => (float[N,M,H,W] p) { p = Relu(c) },
            else_branch = g2 () => (float[N,M,H,W] q) { q = Neg(c) }
        >
        y = Conv(i, v)
        """,
        {"w": (4, 3, 1, 1), "v": (5, 4, 1, 1)},
        inputs="float[N,3,8,8] x, float size, float half",
    )
    model = qwrap.load(proto).eval()
    qwrap.prepare(model, qwrap.QConfig(scope="kernels"))
    batches = [(x, 1.0, 0.5) for x in small.batches()]
    data = [tuple(torch.as_tensor(v, dtype=torch.float32) for v in b) for b in batches]
    qwrap.calibrate(model, data, progress=False)
    prefixes = Prefixes(Carrier(U8, model))
    assert prefixes.start([UsePoint("/y", 1)]) == prefixes.nodes.index("/i")
    found = qwrap.sensitivity(model, data, by="tensor", progress=False)
    assert found.losses["v", U8] > 0
