"""4-bit floats against the incumbent's native quantizer, and as files."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime.capi._pybind_state as native
import pytest
import torch
from nbits_files import FP4, NF4, attributes, drawn, in_floats, product, run

import qwrap
from qwrap.nbits.bnb4 import KINDS, float4_arrays

pytestmark = pytest.mark.ort(302)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_codes_are_the_native_quantizers_bit_for_bit(kind: Any, block: int, dtype: type) -> None:
    for k, n in ((64, 24), (40, 7), (13, 5)):
        weight = drawn(k, n, dtype=dtype)
        weight[:, 0], weight[:, 1] = 0, np.abs(weight[:, 1])
        matrix = np.ascontiguousarray(weight.T)
        packed = np.zeros((n * k + 1) // 2, np.uint8)
        largest = np.zeros(-(-n * k // block), dtype)
        native.quantize_matmul_bnb4(packed, matrix, largest, block, KINDS[kind], n, k)
        ours = float4_arrays(torch.from_numpy(weight.T), block, kind)
        np.testing.assert_array_equal(ours[1], largest)
        if n * k % 2:  # the incumbent fills the last byte with the code of 0
            packed[-1] &= 0xF0
        np.testing.assert_array_equal(ours[0], packed)


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_each_value_becomes_the_nearest_level(kind: Any) -> None:
    levels = np.array(NF4 if kind == "nf4" else [*FP4, *(-x for x in FP4)])
    values = np.append(np.linspace(-1, 1, 4095), 1.0).astype(np.float32)
    packed, largest = float4_arrays(torch.from_numpy(values[None]), 4096, kind)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    assert largest == [1.0]
    error = np.abs(levels[codes] - values)
    least = np.abs(levels[:, None] - values).min(0)
    # Levels and middles are known to 6 digits.
    np.testing.assert_allclose(error, least, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_files_compute_what_their_codes_mean(kind: Any, dtype: type) -> None:
    model = qwrap.quantize_weights(product(drawn(64, 24, dtype=dtype)), form=kind, block_size=32)
    assert model is not None
    (node,) = model.graph.node
    assert (node.op_type, node.name) == ("MatMulBnb4", "product_Bnb4")
    assert list(node.input) == ["x", "w_Bnb4", "w_absmax"]
    assert attributes(node) == {"K": 64, "N": 24, "block_size": 32, "quant_type": KINDS[kind]}
    x = {"x": drawn(3, 64, seed=1, dtype=dtype)}
    (wanted,), (got,) = run(in_floats(model), x), run(model, x)
    slack = 2e-3 if dtype == np.float16 else 1e-5  # kernels add in other orders
    np.testing.assert_allclose(got, wanted, rtol=slack, atol=slack)
