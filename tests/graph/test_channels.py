"""Dividing channels: what may take the divisor in, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qwrap.graph.channels import divide, find_products
from qwrap.graph.constants import Constants

Array = np.ndarray[Any, Any]
Build = Callable[..., onnx.ModelProto]
INSERTED = ["h_smooth_mul"]


@pytest.fixture
def build(small: Any) -> Build:
    made: Build = small.build
    return made


def run(model: onnx.ModelProto) -> list[Array]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    inputs = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 5 for size in value.shape]
        inputs[value.name] = rng.normal(0, 1, shape).astype(np.float32)
    if "flag" in inputs:
        inputs["flag"] = np.array(True)
    found: list[Array] = session.run(None, inputs)
    return found


def divided(model: onnx.ModelProto, op_types: tuple[str, ...] = ("MatMul", "Conv")) -> list[str]:
    """Divide what /y and nodes beside it read; check the function; return the inserted nodes."""
    draft = ir.from_proto(model)
    constants = Constants(draft)
    for products in find_products(draft, op_types):
        if "/y" in [node.name for node in products.nodes]:
            scale = np.random.default_rng(1).uniform(0.25, 4, products.channels)
            name = divide(constants, products, scale)
    result = ir.to_proto(draft)
    onnx.checker.check_model(result, full_check=True)
    for before, after in zip(run(model), run(result), strict=True):
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    return [] if name is None else [name]


def test_a_reader_in_a_body_must_not_see_it(build: Build) -> None:
    nodes = """
        h = Mul(x, g) y = MatMul(h, w)
        z = If(flag) <then_branch = t () => (float[N,16] a) { a = Relu(h) },
                      else_branch = e () => (float[N,16] b) { b = Identity(x) }>
    """
    model = build(nodes, {"g": (16,), "w": (16, 8)}, "float[N,16] x, bool flag",
                  "float[N,8] y, float[N,16] z")  # fmt: skip
    assert divided(model) == INSERTED


def test_products_in_a_body_and_outside_are_divided_apart(build: Build) -> None:
    nodes = """
        h = Mul(x, g) y = MatMul(h, w)
        z = If(flag) <then_branch = t () => (float[N,8] a) { a = MatMul(h, v) },
                      else_branch = e () => (float[N,8] b) { b = MatMul(x, v) }>
    """
    model = build(nodes, {"g": (16,), "w": (16, 8), "v": (16, 8)}, "float[N,16] x, bool flag",
                  "float[N,8] y, float[N,8] z")  # fmt: skip
    assert divided(model) == INSERTED


def test_a_graph_output_must_not_be_divided(build: Build) -> None:
    model = build("h = Mul(x, g) y = MatMul(h, w)", {"g": (16,), "w": (16, 8)}, "float[N,16] x",
                  "float[N,8] y, float[N,16] h")  # fmt: skip
    assert divided(model) == INSERTED


def test_who_asks_for_the_shape_alone_may_read_it(build: Build) -> None:
    model = build("h = Mul(x, g) s = Shape(h) y = MatMul(h, w)", {"g": (16,), "w": (16, 8)},
                  "float[N,16] x", "float[N,8] y, int64[2] s")  # fmt: skip
    assert divided(model) == []


@pytest.mark.parametrize(
    "nodes",
    [
        "h = com.microsoft.SkipLayerNormalization(x, x, g, b)",
        "h = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)",
        "h = SimplifiedLayerNormalization(x, g)",
    ],
)
def test_normalisations_of_onnxruntime_take_it_in(build: Build, nodes: str) -> None:
    model = build(f"{nodes} y = MatMul(h, w)", {"g": (16,), "b": (16,), "w": (16, 8)},
                  "float[2,N,16] x", "float[2,N,8] y", opset=17)  # fmt: skip
    if "Skip" in nodes:
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    draft = ir.from_proto(model)
    (products,) = find_products(draft, ("MatMul",))
    assert divide(Constants(draft), products, np.linspace(0.5, 2, 16)) is None
    for before, after in zip(run(model), run(ir.to_proto(draft)), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_a_gain_that_others_use_too_is_copied(build: Build) -> None:
    nodes = "h = Mul(x, g) z = Mul(x, g) y = MatMul(h, w)"
    model = build(nodes, {"g": (16,), "w": (16, 8)}, "float[N,16] x", "float[N,8] y, float[N,16] z")
    assert divided(model) == []


@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (1, 1, 16)])
def test_constants_of_other_ranks_take_it_in(build: Build, shape: tuple[int, ...]) -> None:
    rank = max(len(shape), 2)
    sizes = ",".join(["N"] * (rank - 1))
    model = build("h = Mul(g, x) y = MatMul(h, w)", {"g": shape, "w": (16, 8)},
                  "float[5,16] x", f"float[{sizes},8] y")  # fmt: skip
    assert divided(model) == []


def test_the_gain_of_another_axis_does_not(build: Build) -> None:
    # As many rows as channels: the gain is that of the rows.
    model = build("h = Mul(x, g) y = MatMul(h, w)", {"g": (16, 1), "w": (16, 8)},
                  "float[16,16] x", "float[16,8] y")  # fmt: skip
    assert divided(model) == INSERTED
    nodes = "c = Transpose<perm=[1,0]>(x) d = Gemm(c, p, q) h = Transpose<perm=[1,0]>(d)"
    model = build(f"{nodes} y = MatMul(h, w)", {"p": (16, 16), "q": (16,), "w": (16, 8)},
                  "float[16,16] x", "float[16,8] y")  # fmt: skip
    assert divided(model) == INSERTED


def test_a_bias_that_is_computed_leaves_it_to_a_mul(build: Build) -> None:
    nodes = "c = MatMul(x, p) s = Sigmoid(x) h = Add(c, s) y = MatMul(h, w)"
    model = build(nodes, {"p": (16, 16), "w": (16, 8)}, "float[N,16] x", "float[N,8] y")
    assert divided(model) == INSERTED
    nodes = "c = MatMul(x, p) s = MatMul(x, q) h = Sub(c, s) y = MatMul(h, w)"
    model = build(nodes, {"p": (16, 16), "q": (16, 16), "w": (16, 8)}, "float[N,16] x",
                  "float[N,8] y")  # fmt: skip
    assert divided(model) == []


def test_batches_of_matrices_are_multiplied_each(build: Build) -> None:
    model = build("h = Mul(x, g) y = MatMul(h, w)", {"g": (16,), "w": (3, 16, 8)},
                  "float[3,N,16] x", "float[3,N,8] y")  # fmt: skip
    assert divided(model) == []


def test_the_type_of_the_weights_stays(build: Build) -> None:
    weights = {name: np.random.default_rng(2).normal(0, 1, shape).astype(np.float16)
               for name, shape in (("g", (16,)), ("w", (16, 8)))}  # fmt: skip
    model = build("h = Mul(x, g) y = MatMul(h, w)", weights, "float16[N,16] x", "float16[N,8] y")
    draft = ir.from_proto(model)
    (products,) = find_products(draft, ("MatMul",))
    for fold in (True, False):
        divide(Constants(draft), products, np.linspace(0.5, 2, 16), fold=fold)
    onnx.checker.check_model(ir.to_proto(draft), full_check=True)
