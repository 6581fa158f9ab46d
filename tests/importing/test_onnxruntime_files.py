"""Files made by onnxruntime's own tool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnxruntime.quantization import QuantType

import qwrap

U8, S8, U16, S16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16, QuantType.QInt16
CONVERT = {"a": [{"quant_type": S8, "convert": {"quant_type": U16, "recv_nodes": {"/b"}}}]}
WEIGHT_NAMES = ("w1", "b1", "w2", "b2", "w3", "w4", "b4")
SETTINGS: dict[str, dict[str, Any]] = {
    "u8s8": {"activation_type": U8, "weight_type": S8},
    "s8s8": {"activation_type": S8, "weight_type": S8},
    "u8u8": {"activation_type": U8, "weight_type": U8},
    "per channel": {"activation_type": U8, "weight_type": S8, "per_channel": True},
    "symmetric": {"extra_options": {"ActivationSymmetric": True}},
    "reduced": {"activation_type": U8, "weight_type": S8, "reduce_range": True},
    "u16": {"activation_type": U16, "weight_type": S8},
    "s16": {"activation_type": S16, "weight_type": S16},
    "contrib": {"activation_type": U8, "extra_options": {"UseQDQContribOps": True}},
    "convert": {"extra_options": {"TensorQuantOverrides": CONVERT}},
    "float weights": {"extra_options": {"AddQDQPairToWeight": True}},
    "float bias": {"extra_options": {"QuantizeBias": False}},
    "dedicated pairs": {"extra_options": {"DedicatedQDQPair": True}},
    "output left": {"op_types_to_quantize": ["Conv", "Add"]},
}


FLOAT_SUMS = {"u16", "s16", "float bias"}
"""Products in float, added in another order than onnxruntime does: codes near ties move."""


@pytest.mark.parametrize("name", SETTINGS)
def test_both_simulations_are_what_onnxruntime_computes(
    network: onnx.ModelProto, by_onnxruntime: Callable, imported: Any, small: Any, name: str
) -> None:
    path = by_onnxruntime(network, **SETTINGS[name])
    model = imported.load(path)
    assert not model.plan.notes
    report = qwrap.verify(model, path, small.batches(), progress=False)
    for level in (report.specification, report.deployed):
        assert level.tensors
        assert level.worst_step <= 2 * (name in FLOAT_SUMS)
        assert level.fraction <= 2e-3


# 16 bits have no kernels, and some float biases onnxruntime quantizes by itself.
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - FLOAT_SUMS))
def test_layers_have_the_kernels_that_onnxruntime_gives_them(
    network: onnx.ModelProto, by_onnxruntime: Callable, small: Any, name: str
) -> None:
    path = by_onnxruntime(network, **SETTINGS[name])
    small.session(path, path.with_suffix(".optimised.onnx"))
    kernels = small.operators(onnx.load(path.with_suffix(".optimised.onnx")).graph)
    plan = qwrap.load(path).plan
    for op_type, kernel in (("Conv", "QLinearConv"), ("Gemm", "QGemm"), ("Add", "QLinearAdd")):
        planned = [n for n in plan.nodes.values() if (n.op_type, n.role) == (op_type, "integer")]
        assert len(planned) == kernels[kernel], op_type


def test_a_step_of_training_changes_scales_codes_and_nothing_else(
    network: onnx.ModelProto, by_onnxruntime: Callable, imported: Any, small: Any
) -> None:
    path = by_onnxruntime(network, per_channel=True)
    model, trained = imported.load(path), path.with_suffix(".trained.onnx")
    imported.train(model, small.batches()[0])
    qwrap.export(model, trained)
    before, after = onnx.load(path), onnx.load(trained)
    old = {tensor.name: tensor for tensor in before.graph.initializer}
    new = {tensor.name: tensor for tensor in after.graph.initializer}
    assert list(old) == list(new)
    different = {name for name in old if old[name] != new[name]}
    assert {"b_scale", "w1_quantized", "w1_scale", "b1_quantized", "b1_quantized_scale"} < different
    assert not [name for name in different if name.endswith("zero_point")]
    del before.graph.initializer[:], after.graph.initializer[:]
    assert before == after
    report = qwrap.verify(model, trained, small.batches(), progress=False)
    assert report.specification.differing == report.deployed.differing == 0


def test_weights_get_the_names_they_had(network: onnx.ModelProto, by_onnxruntime: Callable) -> None:
    model = qwrap.load(by_onnxruntime(network))
    assert set(WEIGHT_NAMES) <= set(model.tensor_names.values())


def test_the_ends_of_codes_are_kept(network: onnx.ModelProto, by_onnxruntime: Callable) -> None:
    plans = {
        reduced: qwrap.load(by_onnxruntime(network, reduce_range=reduced)).plan.constants
        for reduced in (False, True)
    }
    assert all(c.spec.narrow_range and not c.spec.reduce_range for c in plans[False].values())
    assert all(c.spec.reduce_range for c in plans[True].values())


def test_calibrating_an_imported_model_again_keeps_its_places(
    network: onnx.ModelProto, by_onnxruntime: Callable, imported: Any, small: Any
) -> None:
    path = by_onnxruntime(network)
    model = imported.load(path, config=qwrap.QConfig(method="minmax"))
    qwrap.calibrate(model, small.batches(8, seed=9), progress=False)
    again = path.with_suffix(".again.onnx")
    qwrap.export(model, again)
    assert [n.name for n in onnx.load(again).graph.node] == [
        n.name for n in onnx.load(path).graph.node
    ]
    report = qwrap.verify(model, again, small.batches(), progress=False)
    assert report.specification.differing == report.deployed.differing == 0
