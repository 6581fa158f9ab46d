"""Functions and single-node methods that scripts call themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.matmul_nbits_quantizer as incumbent
import pytest
import torch
from nbits_files import attributes, constants, drawn, lookup, product

import qwrap.ort.matmul_nbits_quantizer as ours

Default = [ours.DefaultWeightOnlyQuantizer, incumbent.DefaultWeightOnlyQuantizer]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            assert x is y
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


@pytest.mark.ort(301)
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_slices() -> None:
    data = drawn(3, 16, 5)
    data[0] = 0
    for name in ("quant_slice_symmetric", "quant_slice_asymmetric"):
        assert_equal(*(getattr(cls, name)(data) for cls in Default))


@pytest.mark.ort(301)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((40, 64), 1), ((40, 50), 0), ((3, 40, 7), -2)])
def test_arrays_in_blocks(shape: tuple[int, ...], axis: int, symmetric: bool) -> None:
    axis %= len(shape)
    assert_equal(*(cls.quantize_ndarray(drawn(*shape), axis, 16, symmetric) for cls in Default))


@pytest.mark.ort(301)
@pytest.mark.parametrize("size", [8, 9])
def test_packing(size: int) -> None:
    data = np.arange(-4, size - 4, dtype=np.int8).clip(-8, 7)
    assert_equal(*([cls.pack_int8_to_int4(data)] for cls in Default))


@pytest.mark.ort(301)
def test_packed_matrices_and_divisors() -> None:
    packed = np.random.default_rng(0).integers(0, 256, 6 * 4 // 2).astype(np.uint8)
    assert_equal(*([m.transpose_packed_int4_matrix(packed, 6, 4)] for m in (ours, incumbent)))
    for a, b in ((64, 32), (65, 32), (32, 64)):
        assert ours.is_divisible(a, b) == incumbent.is_divisible(a, b)


@pytest.mark.ort(281, 285, 301)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("form", "bits"), [("QOperator", 4), ("QOperator", 8), ("QDQ", 4)])
def test_blocks_of_a_matrix(form: str, bits: int, symmetric: bool) -> None:
    results = []
    for module in (ours, incumbent):
        config = module.DefaultWeightOnlyQuantConfig(
            32, symmetric, quant_format=module.QuantFormat[form], bits=bits
        )
        quantizer = module.DefaultWeightOnlyQuantizer(config)
        results.append(quantizer.qbits_block_quant(drawn(72, 24)))
        with pytest.raises(ValueError, match="only supports 2D tensors"):
            quantizer.qbits_block_quant(drawn(2, 3, 4))
    (packed, scale, zero), others = results[0], results[1]
    assert_equal((packed, scale), others[:2])
    if not symmetric:
        assert_equal([zero], others[2:])
    assert zero.shape == others[2].shape


@pytest.mark.ort(274, 301)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_one_node_of_a_message(form: str, symmetric: bool) -> None:
    found = []
    for module in (ours, incumbent):
        config = module.DefaultWeightOnlyQuantConfig(
            32, symmetric, 4, quant_format=module.QuantFormat[form]
        )
        graph = product(drawn(64, 24)).graph
        graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [64, 24]))
        nodes = module.DefaultWeightOnlyQuantizer(config).quantize(graph.node[0], [graph])
        assert [value.name for value in graph.input] == ["x"]
        found.append((
            [(n.op_type, n.name, list(n.input), list(n.output), attributes(n)) for n in nodes],
            {k: v.tobytes() for k, v in constants(graph).items()},
        ))
    assert found[0] == found[1]


@pytest.mark.ort(289, 301)
def test_one_table_of_a_message() -> None:
    found = []
    for module in (ours, incumbent):
        config = module.DefaultWeightOnlyQuantConfig(16)
        graph = lookup(drawn(40, 64)).graph
        (node,) = module.DefaultWeightOnlyQuantizer(config).quantize(graph.node[0], [graph])
        values = {k: v.tobytes() for k, v in constants(graph).items()}
        found.append((node.op_type, list(node.input), attributes(node), values))
    assert found[0] == found[1]


@pytest.mark.ort(274, 301)
def test_a_node_without_weights_stays_and_weights_are_found_further_out() -> None:
    config = ours.DefaultWeightOnlyQuantConfig(32)
    outer, inner = product(drawn(64, 24)).graph, onnx.GraphProto()
    quantizer = ours.DefaultWeightOnlyQuantizer(config)
    node = onnx.helper.make_node("MatMul", ["x", "v"], ["z"])
    assert quantizer.quantize(node, [outer, inner]) == [node]
    assert quantizer.quantize(onnx.helper.make_node("Relu", ["x"], ["z"]), [outer]) != []
    (made,) = quantizer.quantize_matmul(outer.node[0], [outer, inner])
    assert made.op_type == "MatMulNBits"
    assert not inner.initializer
    tensor, owner = ours.get_initializer("w_Q4", [outer, inner])
    assert tensor is not None
    assert owner is outer
    assert ours.get_initializer("nothing", [outer]) == (None, None)


# --- HQQ -----------------------------------------------------------------------------------------


@pytest.mark.ort(293, 301)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_in_bytes(bits: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 2**bits, (6, 16))).int()
    packed = []
    for cls in (ours.HQQWeightOnlyQuantizer, incumbent.HQQWeightOnlyQuantizer):
        target = torch.zeros(6, 16 * bits // 8, dtype=torch.uint8)
        cls.pack_on_row_fast_248bit(target, codes, bits)
        packed.append(target)
        with pytest.raises(NotImplementedError, match="Only 2,4,8 bits"):
            cls.pack_on_row_fast_248bit(target, codes, 3)
    if bits < 8:  # at 8 the incumbent transposes both, and packs the same
        assert torch.equal(*packed)
    assert torch.equal(packed[0], packed[1])


@pytest.mark.ort(293, "G22")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("shape", [(8, 128), (8, 100), (64, 30)])
def test_half_quadratic_codes(shape: tuple[int, ...], optimize: bool, axis: int) -> None:
    weight, found = torch.from_numpy(drawn(*shape)), []
    for module in (ours, incumbent):
        quantizer = module.HQQWeightOnlyQuantizer(module.HQQWeightOnlyQuantConfig())
        if module is incumbent and axis == 0:
            break  # its minima along axis 0 are those of the first column
        found.append(
            quantizer.quantize_internal(weight, group_size=32, optimize=optimize, axis=axis)
        )
    codes, scale, zero = found[0]
    rows = codes.reshape(-1, 32) if axis == 1 else codes.reshape(32, -1)
    spread = [t.reshape(-1, 1) if axis == 1 else t.reshape(1, -1) for t in (scale, zero)]
    meant = ((rows - spread[1]) * spread[0]).reshape(codes.shape)
    error = (meant[: shape[0], : shape[1]] - weight).abs().mean()
    assert error < 0.3 * 0.1  # 4 bits of a range of about 4 sigmas: a quarter step is 0.02
    if len(found) == 2:
        theirs = found[1]
        assert [t.shape for t in found[0]] == [t.shape for t in theirs]
        if not optimize:
            for a, b in zip(found[0], theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.ort(293)
def test_one_scale_for_all() -> None:
    weight = torch.from_numpy(drawn(8, 64))
    quantizer = ours.HQQWeightOnlyQuantizer(ours.HQQWeightOnlyQuantConfig())
    codes, scale, zero = quantizer.quantize_internal(weight, channel_wise=False)
    assert scale.numel() == zero.numel() == 1
    assert ((codes - zero) * scale - weight).abs().max() <= scale * 1.01  # zero is rounded


@pytest.mark.ort(293)
def test_better_zero_points_are_found() -> None:
    weight = torch.from_numpy(drawn(32, 64)) ** 3
    low, high = weight.aminmax(dim=1, keepdim=True)
    inverse = 15 / (high - low)
    start = -low * inverse
    _, best = ours.HQQWeightOnlyQuantizer.optimize_weights(weight, inverse, start, [0, 15], axis=1)

    def error(zero: torch.Tensor) -> float:
        codes = (weight * inverse + zero).round().clamp(0, 15)
        return float((weight - (codes - zero) / inverse).abs().mean())

    assert error(best) < error(start)
