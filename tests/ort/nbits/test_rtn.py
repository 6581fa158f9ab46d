"""Round to nearest in ranges, with settings for each node."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime.quantization.matmul_nbits_quantizer as incumbent
import pytest
from nbits_files import attributes, constants, drawn, in_floats, matrix, model_of, product, run
from onnx import helper

import qwrap.ort.matmul_nbits_quantizer as ours
from qwrap.ort.errors import QuantizationError


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def chain(count: int = 3) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(count)]
    weights = {f"w{i}": drawn(64, 64, seed=i) for i in range(count)}
    return model_of(nodes, weights, {"h0": ["B", 64]}, [f"h{count}"])


@pytest.mark.ort(294)
def test_settings_of_one_node() -> None:
    custom = {
        "/h1": {"bits": 8, "group_size": 16, "scheme": "sym"},
        "/h2": {"group_size": -1},
    }
    for kind in (ours.RTNWeightOnlyQuantConfig, ours.KQuantWeightOnlyQuantConfig):
        quantizer = ours.MatMulNBitsQuantizer(
            chain(), block_size=32, algo_config=kind(customized_weight_config=custom)
        )
        quantizer.process()
        model = quantizer.model.model
        given = [attributes(n) for n in model.graph.node]
        assert [(a["bits"], a["block_size"]) for a in given] == [(8, 16), (4, 64), (4, 32)]
        x = {"h0": drawn(3, 64, seed=9)}
        (wanted,), (got,) = run(in_floats(model), x), run(model, x)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    names = [list(n.input) for n in model.graph.node]
    assert names[0][1:] == ["w0_Q8G16", "w0_scale", "w0_zp"]


@pytest.mark.ort(294)
@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ({"/h9": {"bits": 8}}, "'/h9' does not exist"),
        ({"/h1": {"bit": 8}}, "'bit' does not exist; 'bits'"),
        ({"/h1": {"bits": 3}}, "Only support 2, 4 or 8 bits"),
        ({"/h1": {"scheme": "symmetric"}}, "is not 'sym' or 'asym'"),
        ({"/h1": {"group_size": 24}}, "power of 2 from 16 on"),
    ],
)
def test_settings_of_one_node_are_checked(custom: Any, message: str) -> None:
    algo = ours.RTNWeightOnlyQuantConfig(customized_weight_config=custom)
    with pytest.raises(QuantizationError, match=message):
        ours.MatMulNBitsQuantizer(chain(), block_size=32, algo_config=algo).process()


@pytest.mark.ort(294)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_rtn_rounds_in_a_share_of_the_range_as_the_incumbent_does(
    ratio: float, symmetric: bool
) -> None:
    files = []
    for module in (ours, incumbent):
        algo = module.RTNWeightOnlyQuantConfig(ratios={"w0": ratio})
        quantizer = module.MatMulNBitsQuantizer(
            chain(1), block_size=32, is_symmetric=symmetric, algo_config=algo
        )
        quantizer.process()
        files.append(quantizer.model.model)
    (a,), (b,) = (file.graph.node for file in files)
    assert (a.name, list(a.input), attributes(a)) == (b.name, list(b.input), attributes(b))
    first, second = (constants(file.graph) for file in files)
    np.testing.assert_allclose(first["w0_scale"], second["w0_scale"], rtol=1e-6)
    meant = [matrix(n, known) for n, known in ((a, first), (b, second))]
    steps = np.abs(meant[0] - meant[1]) / np.repeat(first["w0_scale"], 32, 1).T
    assert steps.max() < 1.01  # the scale is rounded before the codes are made, there after
    # The largest magnitude of a symmetric block lies half way between two codes.
    assert (steps > 0.5).mean() < (1 / 32 if symmetric else 0.001)


@pytest.mark.ort(294)
def test_rtn_is_right_in_blocks_on_one_side_of_zero() -> None:
    """onnxruntime's RTN saturates there: the zero point of the smallest value is out of range."""
    weight = np.random.default_rng(0).uniform(1, 2, (64, 8)).astype(np.float32)
    errors = []
    for module in (ours, incumbent):
        quantizer = module.MatMulNBitsQuantizer(
            product(weight), block_size=32, algo_config=module.RTNWeightOnlyQuantConfig()
        )
        quantizer.process()
        model = quantizer.model.model
        errors.append(np.abs(matrix(model.graph.node[0], constants(model.graph)) - weight).max())
    assert errors[0] <= 2 / 15 / 2 * 1.001
    assert errors[1] > 0.5
