"""Caches of a decoder as codes: what they hold, what they cost, and that they never drift."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())


def quantized(kv: Any, folder: Path, model: onnx.ModelProto, **changes: Any) -> Any:
    path = folder / "quantized.onnx"
    batches = changes.pop("batches", kv.batches())
    report = qwrap.quantize_kv_cache(model, path, batches, progress=False, **changes)
    onnx.checker.check_model(path, full_check=True)
    return report, kv.decoder(path)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_cache_is_close_to_the_float_one(
    kv: Any, tmp_path: Path, dtype: str, symmetric: bool, granularity: Any
) -> None:
    model = kv.model()
    _, decoder = quantized(
        kv, tmp_path, model, dtype=dtype, symmetric=symmetric, keys=granularity, values=granularity
    )
    ids = kv.tokens(batch=2)
    expected, _ = kv.decoder(model).run(ids)
    found, caches = decoder.run(ids)
    assert sqnr(expected, found) > (30 if "8" in dtype else 8)
    codes = caches["past_0_key"]
    assert codes.shape == ((2, 2, 24, 8) if "8" in dtype else (2, 2, 24, 4))
    assert codes.dtype == (np.int8 if dtype == "int8" else np.uint8)


def test_codes_are_the_nearest_ones_of_the_float_cache(kv: Any, tmp_path: Path) -> None:
    model, ids = kv.model(), kv.tokens()
    report, decoder = quantized(kv, tmp_path, model, keys="channel")
    _, caches = decoder.run(ids)
    _, floats = kv.decoder(model).run(ids)
    # One layer: what is written depends on tokens alone, so that it is that of the float decoder.
    for name, values in floats.items():
        scale = report[name].scale.reshape(1, 2, 1, 8)
        expected = np.clip(np.rint(values / scale), -128, 127)
        np.testing.assert_array_equal(caches[name], expected)


@pytest.mark.parametrize("dtype", ["int8", "uint4"])
def test_codes_of_the_past_never_change_in_100_steps(kv: Any, tmp_path: Path, dtype: str) -> None:
    _, decoder = quantized(kv, tmp_path, kv.model(), dtype=dtype, symmetric=False)
    past, ids = decoder.empty(), kv.tokens(100)
    for step in range(100):
        _, new = decoder.run(ids[:, step : step + 1], past=past)
        for name, codes in past.items():
            np.testing.assert_array_equal(new[name][:, :, :step], codes)
        past = new


def test_tokens_one_by_one_give_what_all_at_once_give(kv: Any, tmp_path: Path) -> None:
    _, decoder = quantized(kv, tmp_path, kv.model())
    ids = kv.tokens()
    one, caches = decoder.run(ids, chunk=1)
    whole, other = decoder.run(ids, chunk=24)
    np.testing.assert_allclose(one, whole, atol=1e-5)  # sums of another order
    for name in caches:
        np.testing.assert_array_equal(caches[name], other[name])


def test_only_caches_change_their_type(kv: Any, tmp_path: Path) -> None:
    report, decoder = quantized(kv, tmp_path, kv.model())
    inputs = {i.name: (i.type, i.shape) for i in decoder.session.get_inputs()}
    outputs = {o.name: o.type for o in decoder.session.get_outputs()}
    assert inputs["past_0_key"] == ("tensor(int8)", ["batch", 2, "past", 8])
    assert inputs["input_ids"][0] == "tensor(int64)"
    assert outputs == {
        "logits": "tensor(float)",
        "present_0_key": "tensor(int8)",
        "present_0_value": "tensor(int8)",
    }
    assert [c.form for c in report.caches] == ["codes", "codes"]
    assert "past_0_key -> present_0_key  key int8, 2 scales (per head), codes" in str(report)
