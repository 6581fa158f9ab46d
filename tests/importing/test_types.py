"""Every number format, trained after import: what is written is what was simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import qwrap
from qwrap import QConfig, QuantSpec
from qwrap.model.points import ValuePoint

FORMATS: dict[str, dict[str, Any]] = {
    "u8, int8 per channel": {},
    "u8, int8 per tensor": {"per_channel": False},
    "u8, uint8": {"weight": "uint8"},
    "u16, int4": {"activation": "uint16", "weight": "int4"},
    "s8, int2": {"activation": "int8", "weight": "int2"},
    "float8": {"activation": "float8e4m3fn", "weight": "float8e5m2"},
    "int4 in blocks": {"weight": QuantSpec(dtype="int4", axis=0, block_size=2)},
    "uint4 in blocks": {"weight": QuantSpec(dtype="uint4", symmetric=False, axis=0, block_size=2)},
    "MXFP4": {
        "activation": None,
        "weight": QuantSpec(dtype="float4e2m1", axis=0, block_size=2, scale_type="float8e8m0"),
    },
    "NVFP4": {
        "activation": None,
        "weight": QuantSpec(dtype="float4e2m1", axis=0, block_size=2, scale_type="float8e4m3fn"),
    },
    "powers of two": {
        "activation": QuantSpec(dtype="int8", power_of_two=True),
        "weight": QuantSpec(dtype="int8", power_of_two=True),
    },
    "com.microsoft": {"activation": "int16", "weight": "int4", "contrib": True},
}
LOG2 = qwrap.codebook_type("log2", [0, *(s * 2.0**-k for k in range(7) for s in (1, -1))])
NF4 = qwrap.codebook_type("nf4ish", np.linspace(-1, 1, 15).round(3).tolist())
FORMATS |= {
    "int3 and float": {"activation": "int3", "weight": "int8"},
    "uint6, int5": {"activation": "uint6", "weight": "int5"},
    "code books": {"activation": LOG2, "weight": LOG2},
    "code books in blocks": {
        "activation": None,
        "weight": QuantSpec(dtype=NF4, axis=0, block_size=2),
    },
}
pytestmark = pytest.mark.filterwarnings("ignore::qwrap.QwrapWarning")  # what has no kernels


WAYS = [*((name, "lsq") for name in FORMATS), ("s8, int2", "lsq+"), ("float8", "pact")]
WAYS += [(name, way) for name in ("u8, uint8", "u16, int4") for way in ("lsq+", "pact")]


@pytest.mark.parametrize(("name", "training"), WAYS)
def test_what_was_trained_is_written_as_simulated(
    small: Any, quantized: Callable, imported: Any, name: str, training: str
) -> None:
    made = quantized(small.convs(), config=QConfig(scope="kernels", **FORMATS[name]))
    model = imported.load(made.path, config=QConfig(training=training))
    assert not model.plan.notes
    for batch in made.batches:
        imported.train(model, batch)
    path = made.path.with_suffix(".trained.onnx")
    qwrap.export(model, path)
    assert path.read_bytes() != made.path.read_bytes()
    again = imported.load(path)
    with torch.no_grad():
        ours, theirs = (m(torch.from_numpy(made.batches[0])) for m in (model, again))
        nodes = qwrap.load(path, quantized="nodes")(torch.from_numpy(made.batches[0]))
    assert torch.equal(theirs, nodes)
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("weight", ["int8", "int7", "int5", "int4", "int3", "int12"])
def test_integers_of_fewer_bits_than_their_carrier_are_told_by_their_codes(
    small: Any, quantized: Callable, weight: str
) -> None:
    made = quantized(small.convs(), config=QConfig(weight=weight, scope="kernels"))
    plan = qwrap.load(made.path).plan
    assert {str(c.spec.dtype) for c in plan.constants.values()} == {weight}
    assert all(c.spec.narrow_range for c in plan.constants.values())


def test_scales_that_are_powers_of_two_stay_so(
    small: Any, quantized: Callable, imported: Any
) -> None:
    config = QConfig(scope="kernels", **FORMATS["powers of two"])
    made = quantized(small.convs(), config=config)
    model = imported.load(made.path, config=imported.learning())
    assert all(tensor.training == "tqt" for tensor in model.plan.sources().values())
    for batch in made.batches:
        imported.train(model, batch)
    qwrap.export(model, made.path.with_suffix(".trained.onnx"))
    tensors = onnx.load(made.path.with_suffix(".trained.onnx")).graph.initializer
    scales = [numpy_helper.to_array(t) for t in tensors if t.name in ("x_scale", "w1_scale")]
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)


def test_models_of_half_precision_come_back(small: Any, quantized: Callable, imported: Any) -> None:
    element = np.float16
    source = small.convs(opset=21)
    for tensor in source.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(element)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(element))
    batches = [batch.astype(element) for batch in small.batches()]
    made = quantized(source, batches, QConfig(scope="kernels"))
    model = imported.load(made.path)
    assert not model.plan.notes
    imported.train(model, batches[0])
    path = made.path.with_suffix(".trained.onnx")
    qwrap.export(model, path)
    (ours,), (theirs,) = imported.run(model, batches[0]), imported.literal(path, batches[0])
    # half precision has 11 bits, and sums in torch and onnxruntime round in different places
    step = float(model.tap(ValuePoint("y")).scale)
    assert np.abs(ours - theirs).max() <= step + 2**-7  # a code, and half's spacing from 4 to 8
    assert (ours != theirs).mean() < 0.05
