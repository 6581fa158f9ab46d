"""Every kernel of a profile belongs to one group or one tensor between groups."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap
from qwrap.mixed.choices import FLOAT, Choice, Group, groups_of
from qwrap.mixed.cost.attribution import Attribution, attribute
from qwrap.mixed.cost.profiling import Kernel, kernels_of
from qwrap.mixed.cost.trial import Trial, make_trial

U8, U16 = Choice("uint8", "int8"), Choice("uint16", "int8")
NODES = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
    c2 = Conv<pads=[1,1,1,1]>(p, w2)
    s = Sin(c2)
    y = Conv(s, w3)
"""
WEIGHTS = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "w3": (4, 8, 1, 1)}
X = {"x": np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)}
INPUT = "float[1,3,16,16] x"
BRIEF = 0.01  # seconds; how long kernels take does not matter here


@pytest.fixture(scope="module")
def graph(small: Any) -> tuple[qwrap.WrappedModel, list[Group]]:
    model = qwrap.load(small.build(NODES, WEIGHTS, INPUT))
    return model, groups_of(model, choices=(U8, U16, FLOAT))


def profiled(
    graph: tuple[qwrap.WrappedModel, list[Group]], folder: Path, *choices: Choice
) -> tuple[Trial, list[Kernel], Attribution]:
    model, groups = graph
    assignment = dict(zip((group.name for group in groups), choices, strict=True))
    trial = make_trial(model, groups, assignment, X, folder / "t.onnx")
    kernels = kernels_of(trial.path, X, 1, folder, BRIEF)
    return trial, kernels, attribute(trial, kernels)


MIXES = [(U8, U8, U8), (FLOAT, FLOAT, FLOAT), (U16, U16, U16), (U8, FLOAT, U16), (FLOAT, U16, U8)]


@pytest.mark.parametrize("choices", MIXES, ids=lambda c: "-".join(map(str, c)))
def test_shares_add_up_to_all_kernels(graph: Any, tmp_path: Path, choices: Any) -> None:
    _, kernels, found = profiled(graph, tmp_path, *choices)
    assert sum(share.kernels for share in found.shares) == len(kernels)
    whole = sum(kernel.seconds for kernel in kernels)
    # The same numbers added up in another order: float64 rounding alone.
    assert sum(share.seconds for share in found.shares) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("choices", MIXES, ids=lambda c: "-".join(map(str, c)))
def test_profiles_name_every_kernel_that_the_optimised_graph_has(
    graph: Any, small: Any, tmp_path: Path, choices: Any
) -> None:
    trial, kernels, _ = profiled(graph, tmp_path, *choices)
    small.session(trial.path, tmp_path / "o.onnx")
    names = {node.name for node in onnx.load(tmp_path / "o.onnx").graph.node}
    assert {kernel.name for kernel in kernels} == names


def test_each_convolution_counts_for_its_group(graph: Any, tmp_path: Path) -> None:
    _, groups = graph
    assert [group.nodes for group in groups] == [("/c1", "/r1"), ("/c2",), ("/y",)]
    _, kernels, found = profiled(graph, tmp_path, U8, U8, U8)
    assert [k.op_type for k in kernels if k.op_type.startswith("QLinear")] == ["QLinearConv"] * 3
    assert found.groups["/c1"].kernels == 1
    assert found.groups["/c2"].kernels == 1
    assert found.groups["/y"].kernels == 1
    assert found.rest.kernels == 1  # Sin
    assert found.borders["p"].kernels == 1  # the pool only moves codes between two groups


def test_conversions_count_for_the_tensor_they_convert(graph: Any, tmp_path: Path) -> None:
    trial, kernels, found = profiled(graph, tmp_path, U8, U16, FLOAT)
    tensors = {border.tensor: border for border in trial.owners.borders}
    assert list(tensors) == ["x", "p", "c2", "s", "y"]
    assert (tensors["p"].producer, tensors["p"].consumers) == ("/c1", ("/c2",))
    assert (tensors["s"].producer, tensors["s"].consumers) == (None, ("/y",))
    assert found.borders["x"].kernels >= 1  # QuantizeLinear, and perhaps a Transpose
    # uint8 to uint16: out of one pair, through another one.
    assert found.borders["p"].kernels >= 3
    converting = [k for k in kernels if "Quantize" in k.op_type or "Dequantize" in k.op_type]
    assert len(converting) >= 6


def test_kernels_in_branches_are_counted_once(small: Any, tmp_path: Path) -> None:
    model = qwrap.load(
        small.build(
            "z = ReduceSum<keepdims=0>(x)\n c = Greater(z, zero)\n"
            "h = If(c) <then_branch = t () => (float[1,3,16,16] a) {a = Sin(x)},"
            " else_branch = e () => (float[1,3,16,16] b) {b = Cos(x)}>\n y = Conv(h, w)",
            {"w": (4, 3, 1, 1), "zero": np.array(-1e9, np.float32)},
            INPUT,
        )
    )
    groups = groups_of(model, choices=(U8, FLOAT))
    trial = make_trial(model, groups, {"/y": U8}, X, tmp_path / "t.onnx")
    kernels = kernels_of(trial.path, X, 1, tmp_path, BRIEF)
    by_name = {kernel.op_type: kernel for kernel in kernels}
    assert by_name["Sin"].inner
    assert not by_name["If"].inner
    found = attribute(trial, kernels)
    assert sum(share.kernels for share in found.shares) == len(kernels)
