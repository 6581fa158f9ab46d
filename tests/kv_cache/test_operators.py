"""Caches in operators that take a past and make a present."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap

GROUPED = """
    x = Gather(table, input_ids) q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    ids_shape = Shape(input_ids) past_shape = Shape(past_0_key)
    batch1 = Slice(ids_shape, zero, one) new = Slice(ids_shape, one, two)
    before = Slice(past_shape, two, three) total1 = Add(before, new) last = Sub(total1, one)
    lasts = Expand(last, batch1) lengths = Cast<to=6>(lasts)
    total0 = Squeeze(total1) total = Cast<to=6>(total0)
    o, present_0_key, present_0_value = com.microsoft.GroupQueryAttention<
        num_heads=2, kv_num_heads=2>(q0, k0, v0, past_0_key, past_0_value, lengths, total)
    logits = MatMul(o, wo)
"""
MULTI_HEAD = """
    x = Gather(table, input_ids) q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    o, present_0_key, present_0_value = com.microsoft.MultiHeadAttention<
        num_heads=2, unidirectional=1>(q0, k0, v0, , , , past_0_key, past_0_value)
    logits = MatMul(o, wo)
"""
STANDARD = """
    x = Gather(table, input_ids) q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    o, present_0_key, present_0_value = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1>(
        q0, k0, v0, , past_0_key, past_0_value)
    logits = MatMul(o, wo)
"""
CONSTANTS = {"zero": 0, "two": 2, "three": 3}


def model_of(kv: Any, nodes: str, opset: int = 17) -> onnx.ModelProto:
    model = kv.model(nodes, opset)
    if opset == 23:
        model.ir_version = 10
    for name, number in CONSTANTS.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    return model


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("keys", ["tensor", "head", "channel"])
@pytest.mark.parametrize("values", ["tensor", "channel"])
def test_group_query_attention_reads_and_writes_codes(
    kv: Any, tmp_path: Path, dtype: str, keys: Any, values: Any
) -> None:
    model, path = model_of(kv, GROUPED), tmp_path / "quantized.onnx"
    report = qwrap.quantize_kv_cache(
        model, path, kv.batches(), dtype=dtype, keys=keys, values=values, progress=False
    )
    assert {c.form for c in report.caches} == {"operator"}
    assert not {"QuantizeLinear", "Cast"} & {n.op_type for n in onnx.load(path).graph.node[-2:]}
    decoder, ids = kv.decoder(path), kv.tokens()
    expected, _ = kv.decoder(model).run(ids)
    found, caches = decoder.run(ids)
    assert sqnr(expected, found) > (30 if dtype == "int8" else 9)
    assert caches["past_0_key"].shape[-1] == (8 if dtype == "int8" else 4)
    whole, same = decoder.run(ids, chunk=24)
    np.testing.assert_array_equal(caches["past_0_value"], same["past_0_value"])
    np.testing.assert_allclose(whole, found, atol=1e-5)  # sums of another order


def test_codes_of_the_operator_are_the_nearest_ones(kv: Any, tmp_path: Path) -> None:
    model, path, ids = model_of(kv, GROUPED), tmp_path / "quantized.onnx", kv.tokens()
    report = qwrap.quantize_kv_cache(model, path, kv.batches(), keys="channel", progress=False)
    _, caches = kv.decoder(path).run(ids)
    _, floats = kv.decoder(model).run(ids)
    for name, values in floats.items():
        steps = np.clip(values / report[name].scale.reshape(1, 2, 1, 8), -128, 127)
        # The kernel multiplies by the inverse of the scale, which moves ties.
        assert np.abs(caches[name] - steps).max() < 0.5 + 1e-4


@pytest.mark.parametrize(
    ("nodes", "opset", "dtype", "symmetric"),
    [
        (GROUPED, 17, "uint8", False),
        (MULTI_HEAD, 17, "int8", True),
        (MULTI_HEAD, 17, "uint4", False),
        (STANDARD, 23, "int8", True),
        (STANDARD, 23, "int8", False),
    ],
)
def test_elsewhere_the_past_becomes_the_same_codes_again(
    kv: Any, tmp_path: Path, nodes: str, opset: int, dtype: str, symmetric: bool
) -> None:
    model, path = model_of(kv, nodes, opset), tmp_path / "quantized.onnx"
    report = qwrap.quantize_kv_cache(
        model, path, kv.batches(), dtype=dtype, symmetric=symmetric, progress=False
    )
    assert {c.form for c in report.caches} == {"requantized"}
    decoder, ids = kv.decoder(path), kv.tokens(100)
    past = decoder.empty()
    for step in range(100):
        _, new = decoder.run(ids[:, step : step + 1], past=past)
        for name, codes in past.items():
            np.testing.assert_array_equal(new[name][:, :, :step], codes)
        past = new
    expected, _ = kv.decoder(model).run(ids)
    found, _ = decoder.run(ids)
    assert sqnr(expected, found) > (30 if "8" in dtype else 9)
