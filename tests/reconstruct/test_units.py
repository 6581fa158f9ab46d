"""The units that models are trained in, on graphs whose blocks are known and on real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwrap
from qwrap.reconstruct.units import find_units

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[3] / "shared"))
BOTH = ("layer", "block")


def prepared(source: Any) -> qwrap.WrappedModel:
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4"))
    return model


def names(units: Any) -> list[list[str]]:
    return [[weight.value for weight in unit.weights] for unit in units]


def flat(units: Any) -> list[str]:
    return [weight.value for unit in units for weight in unit.weights]


def conv(y: str, x: str, w: str) -> str:
    return f"{y} = Conv<pads=[1,1,1,1]>({x}, {w}) "


def weights(*more: str) -> dict[str, Any]:
    return dict.fromkeys(more, (3, 3, 3, 3))


RESIDUAL = (
    conv("a", "x", "w0")
    + conv("b", "a", "w1")
    + "c = Relu(b) "
    + conv("d", "c", "w2")
    + "e = Add(d, a) f = Relu(e) "
    + conv("g", "f", "w3")
    + conv("h", "g", "w4")
    + conv("i", "h", "w5")
    + "y = Add(i, f)"
)


def residual(small: Any) -> qwrap.WrappedModel:
    return prepared(small.build(RESIDUAL, weights("w0", "w1", "w2", "w3", "w4", "w5")))


def test_a_layer_ends_behind_its_activation_and_the_sum(small: Any) -> None:
    units, left_out = find_units(residual(small), "layer")
    assert names(units) == [["w0"], ["w1"], ["w2"], ["w3"], ["w4"], ["w5"]]
    assert [unit.outputs for unit in units] == [("a",), ("c",), ("f",), ("g",), ("h",), ("y",)]
    assert units[2].inputs == ("a", "c")
    assert not left_out


def test_a_block_ends_where_one_activation_is_alive(small: Any) -> None:
    units, _ = find_units(residual(small), "block")
    assert names(units) == [["w0", "w1", "w2"], ["w3", "w4", "w5"]]
    assert [unit.inputs for unit in units] == [(), ("f",)]
    assert [unit.outputs for unit in units] == [("f",), ("y",)]


def test_skips_that_run_far_are_alive_at_cuts_and_inputs_of_later_units(small: Any) -> None:
    nodes = conv("a0", "x", "v")
    for i in range(10):
        nodes += conv(f"a{i + 1}", f"a{i}", f"w{i}")
    nodes += "s = Add(a0, a10) t = Add(s, a4) y = Relu(t)"
    found = prepared(small.build(nodes, weights("v", *(f"w{i}" for i in range(10)))))
    units, _ = find_units(found, "block")
    assert flat(units) == ["v", *(f"w{i}" for i in range(10))]
    assert {"a0", "a4"} <= set(units[-1].inputs)
    assert all("a0" in unit.alive for unit in units[1:])


def test_branches_and_several_graph_inputs_are_covered(small: Any) -> None:
    nodes = conv("a", "x", "w0") + conv("b", "z", "w1") + "c = Concat<axis=1>(a, b) y = Conv(c, w2)"
    source = small.build(
        nodes,
        weights("w0", "w1") | {"w2": (4, 6, 1, 1)},
        inputs="float[N,3,8,8] x, float[N,3,8,8] z",
    )
    for granularity in BOTH:
        units, _ = find_units(prepared(source), granularity)
        assert flat(units) == ["w0", "w1", "w2"]


def test_a_weight_of_two_units_is_left_out_and_one_of_one_unit_is_not(small: Any) -> None:
    nodes = conv("a", "x", "w") + "b = Relu(a) " + conv("y", "b", "w")
    model = prepared(small.build(nodes, weights("w")))
    units, left_out = find_units(model, "layer")
    assert names(units) == [[], []]
    assert left_out == ["1 weights are shared by several units"]
    units, left_out = find_units(model, "block")
    assert names(units) == [["w"]]
    assert len(units[0].weights[0].uses) == 2
    assert not left_out


def test_weights_in_bodies_and_tables_are_left_out_with_their_reasons(small: Any) -> None:
    nodes = """
        e = Gather(table, i) s = ReduceSum<keepdims=0>(e) p = Greater(s, zero)
        b = If (p) <
            then_branch = yes () => (float[N,4] t) { t = MatMul(e, w0) },
            else_branch = no () => (float[N,4] f) { f = Neg(e) }
        >
        y = MatMul(b, w1)
    """
    arrays = {"table": (9, 4), "w0": (4, 4), "w1": (4, 2), "zero": np.float32(0)}
    source = small.build(nodes, arrays, inputs="int64[N] i", outputs="float[N,2] y")
    model = qwrap.load(source).eval()
    qwrap.prepare(model, qwrap.QConfig(weight="int4", scope="all"))
    units, left_out = find_units(model, "layer")
    assert flat(units) == ["w1"]
    assert "1 weights are inside the body of an If, Loop or Scan" in left_out


NAMES = [
    "squeezenet1_0_imagenet",
    "mobilenetv2_cifar10_128",
    "resnet20_cifar10",
    "mnist_cntk",
    "nanodet_m_320",
    "espnetv2_s2_voc_256",
    "super_resolution",
    "ppocr_en_number_rec",
    "silero_vad",
    "minilm_l6",
    "stories260k",
]


@pytest.mark.parametrize("name", NAMES)
def test_units_of_real_models_hold_every_weight_once(name: str) -> None:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("needs the folder of shared models beside the checkout")
    model = prepared(path)
    for granularity in BOTH:
        units, left_out = find_units(model, granularity)
        inside = flat(units)
        planned = {constant.value for constant in model.plan.constants.values()}
        matrices = {v for v in planned if (model.graph.types[v].rank or 0) > 1}
        assert len(inside) == len(set(inside))
        assert len(matrices) - len(inside) == sum(int(line.split()[0]) for line in left_out)
        made = [key for unit in units for key in unit.outputs]
        assert len(made) == len(set(made))
        for i, unit in enumerate(units):
            assert set(unit.inputs) <= unit.alive <= {key for u in units[:i] for key in u.outputs}
