"""Conv with dequantized kernels, against float sessions with the weights that codes mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from nbits_files import Array, attributes, constants, drawn, model_of, run, table
from onnx import helper

import qwrap
from qwrap.ort.report import Report

KERNELS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]] = {
    "1d": ((6, 8, 5), 1, (2, 8, 20)),
    "2d": ((6, 8, 3, 3), 1, (2, 8, 9, 9)),
    "3d": ((4, 4, 2, 3, 2), 1, (1, 4, 6, 6, 6)),
    "grouped": ((8, 4, 3, 3), 2, (2, 8, 9, 9)),
    "depthwise": ((8, 1, 3, 3), 8, (2, 8, 9, 9)),
}


def conv(kind: str, **settings: Any) -> onnx.ModelProto:
    kernel, group, shape = KERNELS[kind]
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="layer", group=group, **settings)
    weights = {"w": drawn(*kernel), "b": drawn(kernel[0], seed=2)}
    return model_of([node], weights, {"x": list(shape)}, ["y"])


def quantized(source: onnx.ModelProto, **settings: Any) -> onnx.ModelProto:
    made = qwrap.quantize_weights(source, op_types=["Conv"], **settings)
    assert made is not None
    return made


def meant(made: onnx.ModelProto, shape: tuple[int, ...]) -> Array:
    (node,) = (n for n in made.graph.node if n.op_type == "DequantizeLinear")
    known = constants(made.graph)
    if "block_size" in attributes(node):
        return table(node, known).reshape(shape)
    codes, scale, *zeros = (known[name].astype(np.float64) for name in node.input)
    along = (-1, *[1] * (codes.ndim - 1))
    return (codes - (zeros[0].reshape(along) if zeros else 0)) * scale.reshape(along)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_computes_what_its_codes_mean(bits: int, symmetric: bool, size: int, kind: str) -> None:
    source = conv(kind)
    made = quantized(source, bits=bits, symmetric=symmetric, block_size=size)
    kernel, _, shape = KERNELS[kind]
    wanted = onnx.ModelProto()
    wanted.CopyFrom(source)
    weight = meant(made, kernel).astype(np.float32)
    wanted.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    feeds = {"x": drawn(*shape, seed=1)}
    # The kernel is the same to the bit but for a rounding of one product: one float32 step.
    np.testing.assert_allclose(run(made, feeds)[0], run(wanted, feeds)[0], atol=1e-5)
    inputs = int(np.prod(kernel[1:]))
    shapes = (
        ["DequantizeLinear", "Reshape", "Conv"] if size < inputs else ["DequantizeLinear", "Conv"]
    )
    assert [n.op_type for n in made.graph.node] == shapes
    assert np.abs(weight - drawn(*kernel)).max() < 2.5 / (2**bits - 1)


def test_two_convolutions_share_a_kernel() -> None:
    kernel = drawn(4, 4, 3, 3)
    nodes = [helper.make_node("Conv", [a, "w"], [b], pads=[1] * 4) for a, b in ("xh", "hy")]
    made = quantized(model_of(nodes, {"w": kernel}, {"x": [1, 4, 6, 6]}, ["y"]), block_size=16)
    assert [n.op_type for n in made.graph.node].count("DequantizeLinear") == 1
    assert len(run(made, {"x": drawn(1, 4, 6, 6)})) == 1


def test_the_report_says_what_it_is() -> None:
    for size, text in ((16, "blocks of 16"), (128, "a scale for each output")):
        report = Report()
        quantized(conv("2d"), block_size=size, report=report)
        assert report.nodes[0].reason == f"DequantizeLinear and Conv, 4 bits, {text}"


@pytest.mark.parametrize(("size", "form"), [(16, "operator"), (256, "qdq")])
@pytest.mark.parametrize("kind", KERNELS)
def test_gptq_through_unfolded_inputs_beats_rounding_to_nearest(
    kind: str, size: int, form: Any
) -> None:
    source, (_, _, shape) = conv(kind, strides=[1] * (len(KERNELS[kind][0]) - 2)), KERNELS[kind]
    rng = np.random.default_rng(4)
    mixing = rng.normal(0, 1, (3, shape[1]))

    def batch() -> Array:  # neighbours and channels are alike, as in images
        x = np.einsum("nc...,cd->nd...", rng.normal(0, 1, (shape[0], 3, *shape[2:])), mixing)
        for axis in range(2, x.ndim):
            x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 2
        return (x + 0.1 * rng.normal(0, 1, x.shape)).astype(np.float32)

    batches, unseen = [batch() for _ in range(16)], [batch() for _ in range(4)]

    def error(**chosen: Any) -> float:
        made = quantized(source, bits=3, block_size=size, form=form, **chosen)
        pairs = [(run(source, {"x": x})[0], run(made, {"x": x})[0]) for x in unseen]
        return sum(float(np.square(a - b).sum()) for a, b in pairs)

    assert error(method="gptq", batches=batches) < 0.7 * error()


def test_awq_leaves_convolutions_to_the_nearest_codes() -> None:
    source, batches = conv("2d"), [drawn(2, 8, 9, 9, seed=i) for i in range(3)]
    plain, awq = quantized(source, block_size=16), quantized(
        source, block_size=16, method="awq", batches=batches
    )  # fmt: skip
    known, other = constants(plain.graph), constants(awq.graph)
    assert all(np.array_equal(known[name], other[name]) for name in known)
