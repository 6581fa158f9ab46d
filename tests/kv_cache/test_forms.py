"""The ways in which graphs put new tokens beside those of the past."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap

# A merged decoder: one branch has a past, the other has not.
MERGED_BRANCHES = """
    present_0_key, present_0_value = If(use_cache_branch) <
        then_branch = with_past () => (float[b,h,t,d] tk, float[b,h,t,d] tv) {
            tk = Concat<axis=2>(past_0_key, k) tv = Concat<axis=2>(past_0_value, v)
        },
        else_branch = without () => (float[b,h,t,d] ek, float[b,h,t,d] ev) {
            ek = Identity(k) ev = Identity(v)
        }>
"""
# Keys are kept as they are multiplied with, values by token: [N, D, T] and [N, T, H, D].
TURNED = """
    pk = Transpose<perm=[0,1,3,2]>(past_0_key)
    jk = Concat<axis=-2>(pk, k) present_0_key = Transpose<perm=[0,1,3,2]>(jk)
    v_new = Transpose<perm=[0,2,1,3]>(v) present_0_value = Concat<axis=1>(past_0_value, v_new)
    vs = Transpose<perm=[0,2,1,3]>(present_0_value)
"""
TURNED_READ = """
    s = MatMul(q, present_0_key) s_shape = Shape(s)
    low = ConstantOfShape<value = float[1] {-1e9}>(s_shape)
    total = Shape<start=3, end=4>(present_0_key) new = Shape<start=1, end=2>(input_ids)
    before = Sub(total, new) next = Add(before, one) next0 = Squeeze(next)
    mask = Trilu<upper=1>(low, next0) masked = Add(s, mask)
    p = Softmax<axis=-1>(masked) o = MatMul(p, vs)
"""
# Only the last 16 tokens stay.
WINDOW = """
    all_k = Concat<axis=2>(past_0_key, k) all_v = Concat<axis=2>(past_0_value, v)
    present_0_key = Slice(all_k, window, end, axis_2)
    present_0_value = Slice(all_v, window, end, axis_2)
"""
WINDOW_READ = """
    kt = Transpose<perm=[0,1,3,2]>(present_0_key) s = MatMul(q, kt)
    p = Softmax<axis=-1>(s) o = MatMul(p, present_0_value)
"""
# Buffers of 24 tokens that are filled; the mask hides what is not yet.
BUFFERS = """
    index = Expand(position, update_shape)
    present_0_key = ScatterElements<axis=2>(past_0_key, index, k)
    present_0_value = ScatterElements<axis=2>(past_0_value, index, v)
"""
TENSOR_SCATTER = """
    position1 = Reshape(position, one)
    present_0_key = TensorScatter<axis=2>(past_0_key, k, position1)
    present_0_value = TensorScatter<axis=2>(past_0_value, v, position1)
"""
BUFFERS_READ = """
    kt = Transpose<perm=[0,1,3,2]>(present_0_key) s = MatMul(q, kt)
    hidden = Greater(slots, position) s_hidden = Where(hidden, lowest, s)
    p = Softmax<axis=-1>(s_hidden) o = MatMul(p, present_0_value)
"""
CONSTANTS = {
    "window": np.array([-16]),
    "end": np.array([2**31]),
    "axis_2": np.array([2]),
    "update_shape": np.array([1, 2, 1, 8]),
    "slots": np.arange(24).reshape(1, 1, 1, 24),
    "lowest": np.array(-1e9, np.float32),
}


def model_of(kv: Any, middle: str, opset: int = 17, **changes: Any) -> onnx.ModelProto:
    model = kv.model(kv.projected + middle + kv.merged, opset, **changes)
    model.ir_version = 10
    used = {name for node in model.graph.node for name in node.input}
    for name, array in CONSTANTS.items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return 10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())


@pytest.mark.parametrize(("dtype", "least"), [("int8", 30), ("uint4", 9)])
def test_branches_of_a_merged_decoder(kv: Any, tmp_path: Path, dtype: str, least: float) -> None:
    model = model_of(kv, MERGED_BRANCHES + kv.attended, inputs=", bool[1] use_cache_branch")
    path = tmp_path / "quantized.onnx"
    report = qwrap.quantize_kv_cache(
        model, path, kv.batches(), dtype=dtype, chunk=5, symmetric=False, progress=False
    )
    assert {c.form for c in report.caches} == {"codes"}
    ids, logits = kv.tokens(), []
    for source in (model, path):
        decoder = kv.decoder(source)
        no, yes = (np.array([flag]) for flag in (False, True))
        first = {"input_ids": ids[:, :8], "use_cache_branch": no, **decoder.empty()}
        head, *past = decoder.session.run(None, first)
        then = dict(zip(decoder.caches, past, strict=True))
        rest = {"input_ids": ids[:, 8:], "use_cache_branch": yes, **then}
        tail, *last = decoder.session.run(None, rest)
        logits.append(np.concatenate([head, tail], 1))
        np.testing.assert_array_equal(last[0][:, :, :8], past[0])
    assert sqnr(*logits) > least


@pytest.mark.parametrize(("dtype", "least"), [("int8", 30), ("uint4", 9)])
def test_caches_of_other_layouts(kv: Any, tmp_path: Path, dtype: str, least: float) -> None:
    model = model_of(kv, TURNED + TURNED_READ)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name.endswith("key"):
            dims[2].dim_value, dims[3].dim_param = 8, dims[2].dim_param
        elif value.name.endswith("value"):
            dims[1].dim_param, dims[2].dim_value = dims[2].dim_param, 2
    path = tmp_path / "quantized.onnx"
    report = qwrap.quantize_kv_cache(
        model, path, kv.batches(), dtype=dtype, symmetric=False, keys="channel", progress=False
    )
    assert [(c.form, c.layout.time) for c in report.caches] == [("codes", 3), ("codes", 1)]
    assert [len(c.scale) for c in report.caches] == [16, 16]
    ids, decoder = kv.tokens(), kv.decoder(path)
    expected, _ = kv.decoder(model).run(ids)
    found, caches = decoder.run(ids)
    assert sqnr(expected, found) > least
    assert caches["past_0_key"].shape == ((1, 2, 8, 24) if "8" in dtype else (1, 2, 4, 24))


def test_a_window_that_slides(kv: Any, tmp_path: Path) -> None:
    model, path = model_of(kv, WINDOW + WINDOW_READ), tmp_path / "quantized.onnx"
    report = qwrap.quantize_kv_cache(model, path, kv.batches(), chunk=1, progress=False)
    assert {c.form for c in report.caches} == {"codes"}
    ids = kv.tokens(40)
    expected, _ = kv.decoder(model).run(ids)
    found, caches = kv.decoder(path).run(ids)
    assert sqnr(expected, found) > 30
    assert caches["past_0_key"].shape == (1, 2, 16, 8)


@pytest.mark.parametrize(
    ("scatter", "opset", "dtype", "form"),
    [
        (BUFFERS, 17, "int8", "codes"),
        (BUFFERS, 17, "int4", "requantized"),  # there are as many indices as values
        (TENSOR_SCATTER, 24, "int8", "codes"),
        (TENSOR_SCATTER, 24, "int4", "codes"),
    ],
)
def test_buffers_that_are_filled(
    kv: Any, tmp_path: Path, scatter: str, opset: int, dtype: str, form: str
) -> None:
    model = model_of(
        kv,
        scatter + BUFFERS_READ,
        opset,
        past="float[1,2,24,8]",
        inputs=", int64 position",
    )
    ids, path = kv.tokens(), tmp_path / "quantized.onnx"

    def run(source: Any) -> np.ndarray:
        decoder, logits = kv.decoder(source), []
        past = decoder.empty()
        for step in range(ids.shape[1]):
            feed = {"input_ids": ids[:, step : step + 1], "position": np.array(step), **past}
            first, *new = decoder.session.run(None, feed)
            past = dict(zip(past, new, strict=True))
            logits.append(first)
        return np.concatenate(logits, 1)

    floats = [{"input_ids": ids[:, i : i + 1], "position": np.array(i)} for i in range(24)]
    report = qwrap.quantize_kv_cache(model, path, floats, dtype=dtype, progress=False)
    assert {c.form for c in report.caches} == {form}
    assert sqnr(run(model), run(path)) > (30 if dtype == "int8" else 9)


@pytest.mark.parametrize("dtype", ["int8", "uint4"])
def test_half_precision(kv: Any, tmp_path: Path, dtype: str) -> None:
    model = model_of(kv, kv.joined + kv.attended.replace("-1e9", "-1e4"))
    half = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*half.graph.input, *half.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in half.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    low = next(n for n in half.graph.node if n.op_type == "ConstantOfShape")
    low.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array([-1e4], np.float16)))
    path = tmp_path / "quantized.onnx"
    qwrap.quantize_kv_cache(half, path, kv.batches(), dtype=dtype, progress=False)
    decoder, ids = kv.decoder(path), kv.tokens(100)
    past = decoder.empty()
    for step in range(100):
        _, new = decoder.run(ids[:, step : step + 1], past=past)
        np.testing.assert_array_equal(new["past_0_key"][:, :, :step], past["past_0_key"])
        past = new
    expected, _ = kv.decoder(model).run(ids)
    found, _ = decoder.run(ids)
    assert sqnr(expected, found.astype(np.float32)) > (30 if dtype == "int8" else 9)


@pytest.mark.parametrize(("dtype", "least"), [("int8", 30), ("uint4", 9)])
def test_caches_that_are_only_read(kv: Any, tmp_path: Path, dtype: str, least: float) -> None:
    crossed = """
        kt = Transpose<perm=[0,1,3,2]>(past_0_key) s = MatMul(q, kt)
        p = Softmax<axis=-1>(s) o = MatMul(p, past_0_value)
    """
    model, path = model_of(kv, crossed), tmp_path / "quantized.onnx"
    del model.graph.output[1:]
    rng, ids = np.random.default_rng(1), kv.tokens(6)
    given = {
        name: rng.normal(size=(1, 2, 30, 8)).astype(np.float32)
        for name in ("past_0_key", "past_0_value")
    }
    report = qwrap.quantize_kv_cache(
        model, path, [{"input_ids": ids, **given}], dtype=dtype, keys="channel", progress=False
    )
    assert [c.present for c in report.caches] == [None, None]
    expected = kv.decoder(model).session.run(None, {"input_ids": ids, **given})[0]
    codes = {name: codes_of(values, report[name]) for name, values in given.items()}
    found = kv.decoder(path).session.run(None, {"input_ids": ids, **codes})[0]
    assert sqnr(expected, found) > least
    with pytest.raises(qwrap.QwrapError, match="no batch wrote usable values"):
        qwrap.quantize_kv_cache(model, path, [{"input_ids": ids}], progress=False)


def codes_of(values: np.ndarray, cache: Any) -> np.ndarray:
    """Codes as ``quantize_kv_cache`` describes them."""
    scale, zero = (x.reshape(1, 2, 1, 8) for x in (cache.scale, cache.zero_point))
    codes = np.clip(np.rint(values / scale) + zero, cache.spec.qmin, cache.spec.qmax)
    if cache.spec.dtype.bits == 8:
        return codes.astype(np.int8)
    low, high = np.split(codes, 2, axis=-1)  # the second half in the upper halves of the bytes
    return (low + 16 * high).astype(np.uint8)
