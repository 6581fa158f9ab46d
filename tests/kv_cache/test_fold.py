"""Scales for each channel are multiplied with queries and results, not with the past."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap

# Heads are repeated, as where several queries share one, and joined with the sequences.
REPEATED = """
    present_0_key = Concat<axis=2>(past_0_key, k) present_0_value = Concat<axis=2>(past_0_value, v)
    k5 = Unsqueeze(present_0_key, two) shape = Shape(present_0_key)
    b = Slice(shape, zero, one) t = Slice(shape, two, three)
    many = Concat<axis=0>(b, heads, times, t, size) kr = Expand(k5, many)
    flat = Concat<axis=0>(b, all_heads, t, size) k4 = Reshape(kr, flat)
    rows = Mul(b, all_heads) one_row = Concat<axis=0>(rows, t, size)
    k3 = Reshape(k4, one_row) kt3 = Transpose<perm=[0,2,1]>(k3)
    back = Concat<axis=0>(b, all_heads, size, t) kt4 = Reshape(kt3, back) kt = Mul(kt4, factor)
    v5 = Unsqueeze(present_0_value, two) vr = Expand(v5, many) v4 = Reshape(vr, flat)
    qt = Concat<axis=1>(q, q) s = MatMul(qt, kt) s_shape = Shape(s)
    low = ConstantOfShape<value = float[1] {-1e9}>(s_shape)
    new = Shape<start=1, end=2>(input_ids)
    before = Sub(t, new) next = Add(before, one) next0 = Squeeze(next)
    mask = Trilu<upper=1>(low, next0) masked = Add(s, mask)
    p = Softmax<axis=-1>(masked) o4 = MatMul(p, v4) o = Slice(o4, zero, two, one)
"""
# Products of all heads of all sequences: where a head is depends on how many sequences there are.
JOINED_HEADS = """
    present_0_key = Concat<axis=2>(past_0_key, k) present_0_value = Concat<axis=2>(past_0_value, v)
    qm = Reshape(q, rows3) km = Reshape(present_0_key, rows3) kt = Transpose<perm=[0,2,1]>(km)
    s = MatMul(qm, kt) s_shape = Shape(s)
    low = ConstantOfShape<value = float[1] {-1e9}>(s_shape)
    t = Shape<start=2, end=3>(present_0_key) new = Shape<start=1, end=2>(input_ids)
    before = Sub(t, new) next = Add(before, one) next0 = Squeeze(next)
    mask = Trilu<upper=1>(low, next0) masked = Add(s, mask)
    p = Softmax<axis=-1>(masked) vm = Reshape(present_0_value, rows3) om = MatMul(p, vm)
    o = Reshape(om, apart)
"""
NUMBERS = {"zero": [0], "two": [2], "three": [3], "heads": [2], "times": [2], "size": [8]}


def repeated(kv: Any) -> onnx.ModelProto:
    model = kv.model(kv.projected + REPEATED + kv.merged)
    for name, numbers in {**NUMBERS, "all_heads": [4]}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), name))
    factor = np.array([0.5], np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(factor, "factor"))
    return model


def joined(kv: Any) -> onnx.ModelProto:
    nodes = JOINED_HEADS.replace("rows3", "rows").replace(
        "qm = ",
        "b = Shape<start=0, end=1>(input_ids) n = Mul(b, heads) "
        "rows = Concat<axis=0>(n, rest, size) apart = Concat<axis=0>(b, heads, rest, size) qm = ",
    )
    model = kv.model(kv.projected + nodes + kv.merged)
    for name, numbers in {"heads": [2], "rest": [-1], "size": [8]}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), name))
    return model


def multiplied(path: Path) -> set[str]:
    """What is multiplied with scales."""
    nodes = onnx.load(path).graph.node
    makers = {output: node for node in nodes for output in node.output}
    found = set()
    for node in nodes:
        if node.op_type == "Mul" and node.input[1].endswith(("_scale", "_scale_1")):
            maker = makers[node.input[0]]
            found.add(maker.op_type)
    return found


@pytest.mark.parametrize(("dtype", "symmetric"), [("int8", True), ("uint8", False), ("int4", True)])
def test_scales_pass_what_repeats_and_joins_heads(
    kv: Any, tmp_path: Path, dtype: str, symmetric: bool
) -> None:
    model, path = repeated(kv), tmp_path / "q.onnx"
    batches = kv.batches()
    qwrap.quantize_kv_cache(
        model, path, batches, dtype=dtype, symmetric=symmetric, keys="channel", progress=False
    )
    assert multiplied(path) == {"Concat", "MatMul"}  # queries and results, nothing of the past
    for ids in (kv.tokens(20), kv.tokens(9, batch=3)):
        expected, _ = kv.decoder(model).run(ids)
        found, _ = kv.decoder(path).run(ids)
        ratio = np.square(expected).sum() / np.square(expected - found).sum()
        assert 10 * np.log10(ratio) > (30 if "8" in dtype else 9)


def test_scales_stay_where_a_head_has_no_place_of_its_own(kv: Any, tmp_path: Path) -> None:
    model, path = joined(kv), tmp_path / "q.onnx"
    qwrap.quantize_kv_cache(model, path, kv.batches(), keys="channel", progress=False)
    assert multiplied(path) == {"Cast"}
    for ids in (kv.tokens(20), kv.tokens(9, batch=3)):
        expected, _ = kv.decoder(model).run(ids)
        found, _ = kv.decoder(path).run(ids)
        ratio = np.square(expected).sum() / np.square(expected - found).sum()
        assert 10 * np.log10(ratio) > 30
