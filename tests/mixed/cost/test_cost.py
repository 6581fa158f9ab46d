"""Bytes and bit operations of groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qwrap
from qwrap.errors import ConfigError, InputError
from qwrap.mixed.choices import FLOAT, Choice, Group, config_with, groups_of
from qwrap.mixed.cost.cost import all_choices, bit_ops_of, bits, bytes_of, rest_bytes

RESIDUAL = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
    a = Add(c2, r1)
    c3 = Conv<group=2>(a, w3)
    m = Mul(c3, k)
    y = Conv(m, w4, b4)
"""
WEIGHTS = {
    "w1": (6, 3, 3, 3),
    "b1": (6,),
    "w2": (6, 6, 3, 3),
    "b2": (6,),
    "w3": (6, 3, 1, 1),
    "k": (1,),
    "w4": (5, 6, 1, 1),
    "b4": (5,),
}
U8, U16, U4 = Choice("uint8", "int8"), Choice("uint16", "int8"), Choice("uint8", "int4")
WEIGHTS_ONLY, HALF = Choice("float32", "int8"), Choice("float16", "float16")
CHOICES = (U8, U16, U4, FLOAT)


def stored_bytes(path: Path) -> int:
    """Bytes of all constants of a file but what belongs to activations.

    That is their scales and zero points, and the number of a Max that keeps two operators apart.
    """
    model = ir.load(path)
    of_pairs = {
        value
        for node in model.graph
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Max")
        and node.inputs[0] is not None
        and node.inputs[0].const_value is None
        for value in node.inputs[1:]
    }
    constants = [v for v in model.graph.initializers.values() if v not in of_pairs]
    made = [node.outputs[0].const_value for node in model.graph if node.op_type == "Constant"]
    return sum(t.nbytes for t in (*(v.const_value for v in constants), *made) if t is not None)


def written(
    folder: Path,
    source: onnx.ModelProto,
    groups: list[Group],
    assignment: Mapping[str, Choice],
    config: qwrap.QConfig,
) -> int:
    model = qwrap.load(source)
    qwrap.prepare(model, config_with(config, groups, assignment))
    qwrap.calibrate(model, [np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)])
    qwrap.export(model, folder / "q.onnx")
    return stored_bytes(folder / "q.onnx")


MIX = {"/c1": U8, "/c2": U16, "/c3": U4, "/y": FLOAT}


@pytest.mark.parametrize("choice", [*CHOICES, WEIGHTS_ONLY, HALF, None], ids=str)
def test_bytes_are_those_of_the_file(small: Any, tmp_path: Path, choice: Choice | None) -> None:
    source = small.build(RESIDUAL, WEIGHTS, outputs="float[N,5,8,8] y")
    choices = (*CHOICES, WEIGHTS_ONLY, HALF)
    model = qwrap.load(source)
    groups = groups_of(model, choices=choices)
    assignment = MIX if choice is None else {group.name: choice for group in groups}
    found, rest = bytes_of(model, groups), rest_bytes(model, groups)
    total = sum(found[key] for key in assignment.items()) + rest
    assert total == written(tmp_path, source, groups, assignment, qwrap.QConfig())


@pytest.mark.parametrize(
    "weight",
    [
        qwrap.QuantSpec(dtype="int4", block_size=2),
        qwrap.QuantSpec(dtype="uint4", symmetric=False, axis=None),
        qwrap.QuantSpec(dtype="int4", symmetric=False),
    ],
    ids=["blocks", "asymmetric", "signed asymmetric"],
)
def test_bytes_of_other_forms_of_weights_too(
    small: Any, tmp_path: Path, weight: qwrap.QuantSpec
) -> None:
    source = small.build(RESIDUAL, WEIGHTS, outputs="float[N,5,8,8] y")
    config = qwrap.QConfig(weight=weight)
    choice = Choice("uint8", weight.dtype.name)
    model = qwrap.load(source)
    groups = groups_of(model, config, choices=(choice, FLOAT))
    assignment = dict.fromkeys([g.name for g in groups], choice)
    found, rest = bytes_of(model, groups, config), rest_bytes(model, groups, config)
    total = sum(found[key] for key in assignment.items()) + rest
    assert total == written(tmp_path, source, groups, assignment, config)


def test_pinned_bytes_of_one_convolution(small: Any) -> None:
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    found = bytes_of(model, groups_of(model, choices=CHOICES))
    assert found["/c1", FLOAT] == 4 * (6 * 3 * 9 + 6)
    # 8 bits: codes, scale (4) and zero point (1) of each channel; bias: code, scale, zero point.
    assert found["/c1", U8] == 6 * 27 + 6 * 5 + 6 * 12
    # Of symmetric 4 bits zero points are left out.
    assert found["/c1", U4] == 6 * 27 / 2 + 6 * 4 + 6 * 12


def test_what_two_nodes_of_unlike_groups_read_counts_once(small: Any, tmp_path: Path) -> None:
    source = small.build(
        "a = Conv(x, w)\n r = Relu(a)\n b = Conv(r, v)\n y = Conv(b, w)",
        {"w": (3, 3, 1, 1), "v": (3, 3, 1, 1)},
        outputs="float[N,3,8,8] y",
    )
    model = qwrap.load(source)
    nodes = [("/a", "/r"), ("/b",), ("/y",)]
    groups = [Group(keys[0], keys, (U8, FLOAT)) for keys in nodes]
    found = bytes_of(model, groups)
    assert [found[g.name, FLOAT] for g in groups] == [36, 36, 0]
    total = sum(found[g.name, U8] for g in groups)
    everywhere = {g.name: U8 for g in groups}
    assert total == written(tmp_path, source, groups, everywhere, qwrap.QConfig())


def test_bit_operations_of_convolutions_are_those_of_the_formula(small: Any) -> None:
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    inputs = {"x": np.zeros((2, 3, 8, 8), np.float32)}
    found = bit_ops_of(model, groups_of(model, choices=CHOICES), inputs)
    places = 2 * 8 * 8
    macs = {"/c1": places * 6 * 27, "/c2": places * 6 * 54, "/c3": places * 6 * 3}
    for name, count in macs.items():
        assert found[name, U8] == 64 * count
        assert found[name, U16] == 128 * count
        assert found[name, U4] == 32 * count
        assert found[name, FLOAT] == 1024 * count


def test_bit_operations_follow_dynamic_shapes_and_both_operands(small: Any) -> None:
    model = qwrap.load(
        small.build(
            "p = MatMul(x, w)\n t = Transpose<perm=[0,2,1]>(p)\n y = MatMul(p, t)",
            {"w": (16, 10)},
            "float[N,T,16] x",
            "float[N,T,U] y",
        )
    )
    groups = [Group("/p", ("/p",), (U4, FLOAT)), Group("/y", ("/y",), (U4, FLOAT))]
    for length in (3, 7):
        found = bit_ops_of(model, groups, {"x": np.zeros((2, length, 16), np.float32)})
        assert found["/p", U4] == 2 * length * 16 * 10 * 8 * 4
        assert found["/y", U4] == 2 * length * length * 10 * 8 * 8  # both are activations
        assert found["/y", FLOAT] == 2 * length * length * 10 * 32 * 32


def test_bit_operations_of_gemm_and_transposed_convolution(small: Any) -> None:
    model = qwrap.load(
        small.build(
            "u = ConvTranspose<strides=[2,2], group=3>(x, w)\n f = Flatten(u)\n"
            "y = Gemm<transB=1>(f, v)",
            {"w": (3, 2, 2, 2), "v": (5, 6 * 16 * 16)},
            outputs="float[N,5] y",
        )
    )
    groups = [Group("/u", ("/u",), (FLOAT,)), Group("/y", ("/y",), (FLOAT,))]
    found = bit_ops_of(model, groups, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert found["/u", FLOAT] == 1024 * 3 * 64 * 2 * 4  # each input with its own two filters
    assert found["/y", FLOAT] == 1024 * 6 * 16 * 16 * 5


def test_bits_of_types() -> None:
    assert [bits(name) for name in ("uint8", "int4", "uint16", "float16", "float32")] == [
        *(8, 4, 16, 16, 32),
    ]


def test_a_list_of_batches_is_no_batch(small: Any) -> None:
    model = qwrap.load(small.build(RESIDUAL, WEIGHTS))
    with pytest.raises(InputError, match="give one batch"):
        bit_ops_of(model, groups_of(model), [np.zeros((1, 3, 8, 8), np.float32)])  # type: ignore[arg-type]


def test_no_groups_cost_nothing_that_could_be_asked() -> None:
    with pytest.raises(ConfigError, match="there are no groups"):
        all_choices([])
