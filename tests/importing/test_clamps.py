"""Activation functions that onnxruntime's tool leaves out come back in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import QuantType

import qwrap

FUNCTIONS = {"Relu(a)": ("Relu", np.inf), "Clip(a, zero, six)": ("Clip", 6.0)}
TYPES = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8, "u16": QuantType.QUInt16}


def network(small: Any, function: str, opset: int) -> onnx.ModelProto:
    numbers = {"zero": 0.0, "six": 6.0}
    constants = {k: np.array(v, np.float32) for k, v in numbers.items() if k in function}
    return small.build(
        f"a = Conv<pads=[1,1,1,1]>(x, w1) b = {function} y = Conv(b, w2)",
        {"w1": (8, 3, 3, 3), "w2": (4, 8, 3, 3), **constants},
        opset=opset,
    )


@pytest.fixture(params=[(f, kind) for f in FUNCTIONS for kind in TYPES], ids=str)
def case(
    request: pytest.FixtureRequest, small: Any, by_onnxruntime: Callable
) -> tuple[onnx.ModelProto, Any, str]:
    function, kind = request.param
    source = network(small, function, opset=21 if kind == "u16" else 13)
    batches = [5 * batch for batch in small.batches()]  # beyond 6 behind the first layer
    path = by_onnxruntime(source, batches, activation_type=TYPES[kind])
    return source, path, function


def test_in_float_an_imported_model_is_the_one_that_was_quantized(small: Any, case: Any) -> None:
    source, path, function = case
    assert FUNCTIONS[function][0] not in {node.op_type for node in onnx.load(path).graph.node}
    model = qwrap.load(path)
    assert any("1 Relu or Clip put back" in line for line in model.plan.changes)
    floating = qwrap.load(source)
    x = 5 * torch.from_numpy(small.batches(1, seed=3)[0])
    with torch.no_grad():
        expected, found = floating(x), qwrap.train.teacher_of(model)(x)
    # Weights have been through 8 bits, which is all that differs: some 40 dB.
    assert qwrap.numerics.sqnr(expected, found) > 30
    qwrap.train.fake_quant(model, False)
    with torch.no_grad():
        assert torch.equal(model(x), found)


def test_the_function_is_absorbed_again_and_the_file_stays_what_it_was(
    small: Any, case: Any, tmp_path: Any
) -> None:
    _, path, _ = case
    model, copy = qwrap.load(path), tmp_path / "copy.onnx"
    assert [
        node.role for node in model.plan.nodes.values() if node.op_type in ("Relu", "Clip")
    ] == ["absorbed"]
    qwrap.export(model, copy)
    assert copy.read_bytes() == path.read_bytes()
    report = qwrap.verify(model, path, small.batches(), progress=False)
    assert report.deployed.worst_step <= 2 * (not model.plan.fused)  # as for other files


def test_calibrated_anew_it_has_the_ranges_of_the_float_model(small: Any, case: Any) -> None:
    source, path, _ = case
    batches = [5 * batch for batch in small.batches()]
    config = qwrap.QConfig(method="minmax", scope="kernels")
    again, other = qwrap.load(path, config=config), qwrap.load(source)
    qwrap.calibrate(again, batches, progress=False)
    qwrap.prepare(other, qwrap.QConfig(method="minmax", scope="kernels"))
    qwrap.calibrate(other, batches, progress=False)
    ranges = [qwrap.Statistics.of(model).tensors["b"] for model in (again, other)]
    assert float(ranges[0].low) == float(ranges[1].low) == 0
    # From weights of 8 bits.
    np.testing.assert_allclose(float(ranges[0].high), float(ranges[1].high), rtol=0.05)


def test_what_may_be_negative_stays_as_it_is(small: Any, by_onnxruntime: Callable) -> None:
    source = small.build(
        "a = Conv(x, w1) b = Sigmoid(a) c = MaxPool<kernel_shape=[2,2]>(b) y = Conv(c, w2)",
        {"w1": (8, 3, 3, 3), "w2": (4, 8, 3, 3)},
    )
    model = qwrap.load(by_onnxruntime(source))
    assert not {"Relu", "Clip"} & {node.op_type for node in model.plan.nodes.values()}
