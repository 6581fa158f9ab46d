"""Attention operators of com.microsoft against onnxruntime."""

import numpy as np
import pytest

rng = np.random.default_rng(9)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


MASKS = {
    "none": None,
    "lengths": np.array([3, 5], np.int32),
    "lengths and starts": np.array([4, 5, 1, 0], np.int32),
    "keys": np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], np.int32),
    "dummy": np.ones((2, 1), np.int32),
    "queries and keys": (rng.random((2, 5, 5)) > 0.3).astype(np.int32),
}


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("name", MASKS)
def test_attention_masks_equal_onnxruntime(check, name, unidirectional) -> None:
    inputs = [normal(2, 5, 8), normal(8, 24), normal(24), MASKS[name]]
    attributes = {"num_heads": 2, "unidirectional": unidirectional}
    check("Attention", inputs, attributes, **CLOSE)
    attributes["mask_filter_value"] = -3.0
    check("Attention", [*inputs, None, normal(1, 2, 5, 5)], attributes, **CLOSE)


@pytest.mark.parametrize("unidirectional", [0, 1])
def test_attention_with_past_equals_onnxruntime(check, unidirectional) -> None:
    inputs = [normal(2, 3, 8), normal(8, 24), normal(24), None, normal(2, 2, 2, 4, 4)]
    attributes = {"num_heads": 2, "unidirectional": unidirectional, "scale": 0.3}
    check("Attention", inputs, attributes, outputs=(0, 1), **CLOSE)
    inputs[3] = (rng.random((2, 7)) > 0.3).astype(np.int32)
    check("Attention", inputs, attributes, outputs=(0, 1), **CLOSE)
    check("Attention", inputs[:3], attributes, outputs=(0, 1), **CLOSE)


def test_attention_with_values_of_another_size_equals_onnxruntime(check) -> None:
    inputs = [normal(2, 3, 8), normal(8, 28), normal(28)]
    check("Attention", inputs, {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 12]}, **CLOSE)


@pytest.mark.parametrize("unidirectional", [0, 1])
def test_multi_head_attention_equals_onnxruntime(check, unidirectional) -> None:
    q, k, v = normal(2, 5, 8), normal(2, 5, 8), normal(2, 5, 12)
    attributes = {"num_heads": 2, "unidirectional": unidirectional}
    check("MultiHeadAttention", [q, k, v], attributes, **CLOSE)
    check("MultiHeadAttention", [q, k, v, normal(28)], {**attributes, "scale": 0.4}, **CLOSE)
    for name in ("lengths", "keys", "queries and keys"):
        inputs = [q, k, v, None, MASKS[name], normal(2, 1, 5, 5)]
        check("MultiHeadAttention", inputs, attributes, **CLOSE)
    check("MultiHeadAttention", [q, k, v], attributes, outputs=(0, 1, 2), **CLOSE)


def test_multi_head_attention_with_past_and_cross_attention_equal_onnxruntime(check) -> None:
    q, k, v = normal(2, 3, 8), normal(2, 3, 8), normal(2, 3, 8)
    past = [normal(2, 2, 4, 4), normal(2, 2, 4, 4)]
    attributes = {"num_heads": 2}
    inputs = [q, k, v, normal(24), None, None, *past]
    check("MultiHeadAttention", inputs, attributes, outputs=(0, 1, 2), **CLOSE)
    scores = {"outputs": (0, 1, 2, 3), "types": {3: np.float32}}
    check("MultiHeadAttention", inputs, attributes, **scores, **CLOSE)
    inputs[4] = (rng.random((2, 7)) > 0.3).astype(np.int32)
    inputs[5] = normal(1, 2, 3, 7)
    attributes["unidirectional"] = 1
    check("MultiHeadAttention", inputs, attributes, outputs=(0, 1, 2), **CLOSE)
    cross = [q, normal(2, 6, 8), normal(2, 6, 8)]
    check("MultiHeadAttention", cross, {"num_heads": 2}, **CLOSE)
    check(
        "MultiHeadAttention", [q, normal(2, 2, 6, 4), normal(2, 2, 6, 4)], {"num_heads": 2}, **CLOSE
    )


def test_packed_queries_keys_and_values_mean_the_same(check, oracle) -> None:
    q, k, v = normal(2, 5, 8), normal(2, 5, 8), normal(2, 5, 8)
    wanted = oracle("MultiHeadAttention", [q, k, v], {"num_heads": 2})
    parts = [x.reshape(2, 5, 2, 4) for x in (q, k, v)]
    attributes = {"num_heads": 2}
    check("MultiHeadAttention", [np.stack(parts, 3)], attributes, expected=wanted, **CLOSE)
    inputs = [q, np.stack(parts[1:], 3)]
    check("MultiHeadAttention", inputs, attributes, expected=wanted, **CLOSE)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding_equals_onnxruntime(check, interleaved) -> None:
    cos, sin = normal(10, 4), normal(10, 4)
    ids = rng.integers(0, 10, (2, 3))
    attributes = {"interleaved": interleaved}
    check("RotaryEmbedding", [normal(2, 3, 16), ids, cos, sin], attributes, **CLOSE)
    check("RotaryEmbedding", [normal(2, 2, 3, 8), ids, cos, sin], attributes, **CLOSE)
    check("RotaryEmbedding", [normal(2, 3, 16), np.array([4]), cos, sin], attributes, **CLOSE)
    partial = {**attributes, "num_heads": 2, "rotary_embedding_dim": 8, "scale": 2.0}
    check("RotaryEmbedding", [normal(2, 3, 24), ids, cos, sin], partial, **CLOSE)
    check("RotaryEmbedding", [normal(2, 2, 3, 12), ids, cos, sin], partial, **CLOSE)


def test_gemma_rotary_embedding_equals_its_formula(check) -> None:
    angles, (q, r, k, s) = normal(2, 3, 4), (normal(2, 2, 3, 4).astype(np.float16) for _ in "qrks")
    cos, sin = (f(angles)[:, None].astype(np.float16) for f in (np.cos, np.sin))
    wanted = [q * cos + r * sin, k * cos + s * sin]
    half = {"rtol": 2e-3, "atol": 2e-3}
    check("GemmaRotaryEmbedding", [angles, q, r, k, s], outputs=(0, 1), expected=wanted, **half)


GQA = [
    {},
    {"scale": 0.3, "softcap": 1.5},
    {"local_window_size": 2},
    {"smooth_softmax": 1},
    {"do_rotary": 1},
    {"do_rotary": 1, "rotary_interleaved": 1},
    {"causal": 0},
]


@pytest.mark.parametrize("attributes", GQA)
def test_group_query_attention_equals_onnxruntime(check, attributes) -> None:
    attributes = {"num_heads": 4, "kv_num_heads": 2, **attributes}
    caches = [normal(12, 8), normal(12, 8)] if attributes.get("do_rotary") else [None, None]
    lengths, total = np.array([4, 4], np.int32), np.array(5, np.int32)
    prompt = [normal(2, 5, 64), normal(2, 5, 32), normal(2, 5, 32), None, None, lengths, total]
    check("GroupQueryAttention", [*prompt, *caches], attributes, outputs=(0, 1, 2), **CLOSE)
    packed = [normal(2, 5, 128), None, None, None, None, lengths, total]
    check("GroupQueryAttention", [*packed, *caches], attributes, outputs=(0, 1, 2), **CLOSE)
    past = [normal(2, 2, 8, 16), normal(2, 2, 8, 16)]
    lengths, total = np.array([6, 3], np.int32), np.array(7, np.int32)
    new = [normal(2, 1, 64), normal(2, 1, 32), normal(2, 1, 32), *past, lengths, total]
    check("GroupQueryAttention", [*new, *caches], attributes, outputs=(0, 1, 2), **CLOSE)
    past = [normal(1, 2, 4, 16), normal(1, 2, 4, 16)]
    lengths, total = np.array([6], np.int32), np.array(7, np.int32)
    more = [normal(1, 3, 64), normal(1, 3, 32), normal(1, 3, 32), *past, lengths, total]
    check("GroupQueryAttention", [*more, *caches], attributes, outputs=(0, 1, 2), **CLOSE)


def test_group_query_attention_options_equal_onnxruntime(check) -> None:
    attributes = {"num_heads": 4, "kv_num_heads": 2}
    lengths, total = np.array([4, 4], np.int32), np.array(5, np.int32)
    prompt = [normal(2, 5, 64), normal(2, 5, 32), normal(2, 5, 32), None, None, lengths, total]
    every = {"outputs": (0, 1, 2), **CLOSE}
    bias = [*prompt, None, None, None, normal(2, 1, 5, 5)]
    check("GroupQueryAttention", bias, attributes, **every)
    check("GroupQueryAttention", bias, {**attributes, "softcap": 1.0}, **every)
    check("GroupQueryAttention", [*bias, normal(4)], attributes, **every)
    caches = [normal(12, 8), normal(12, 8)]
    ids = np.arange(3, 8)[None].repeat(2, 0)
    check("GroupQueryAttention", [*prompt, *caches, ids], {**attributes, "do_rotary": 1}, **every)
    past = [normal(2, 2, 8, 16), normal(2, 2, 8, 16)]
    lengths, total = np.array([6, 3], np.int32), np.array(7, np.int32)
    new = [normal(2, 1, 64), normal(2, 1, 32), normal(2, 1, 32), *past, lengths, total]
    ids = np.array([[7], [2]])
    check("GroupQueryAttention", [*new, *caches, ids], {**attributes, "do_rotary": 1}, **every)


@pytest.mark.parametrize("which", [1, 2])
def test_scores_of_group_query_attention_equal_onnxruntime(check, which) -> None:
    attributes = {"num_heads": 4, "kv_num_heads": 2, "qk_output": which}
    lengths, total = np.array([4, 4], np.int32), np.array(5, np.int32)
    prompt = [normal(2, 5, 64), normal(2, 5, 32), normal(2, 5, 32), None, None, lengths, total]
    check("GroupQueryAttention", prompt, attributes, outputs=(0, 1, 2, 3), **CLOSE)


def test_queries_and_keys_are_normalized_before_attention(check, oracle) -> None:
    attributes = {"num_heads": 4, "kv_num_heads": 2}
    lengths, total, v = np.array([4, 4], np.int32), np.array(5, np.int32), normal(2, 5, 32)
    q, k, weights = normal(2, 5, 64), normal(2, 5, 32), (normal(16), normal(16))
    normed = []
    for x, weight in zip((q, k), weights, strict=True):
        parts = x.reshape(2, 5, -1, 16)
        rms = np.sqrt((parts**2).mean(-1, keepdims=True) + np.float32(1e-6))
        normed.append((parts / rms * weight).reshape(x.shape))
    wanted = oracle("GroupQueryAttention", [*normed, v, None, None, lengths, total], attributes)
    inputs = [q, k, v, None, None, lengths, total, *[None] * 7, *weights]
    check("GroupQueryAttention", inputs, attributes, expected=wanted, **CLOSE)


def test_one_token_attends_as_onnxruntime_has_it(check, oracle) -> None:
    op_type = "DecoderMaskedMultiHeadAttention"
    q, k, v = normal(2, 1, 8), normal(2, 1, 8), normal(2, 1, 8)
    past = [normal(2, 2, 4, 4), normal(2, 2, 4, 4)]
    mask = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], np.int32)
    every = {"outputs": (0, 1, 2), **CLOSE}
    own = [q, k, v, normal(24), mask, None, *past]
    wanted = oracle("MultiHeadAttention", own, {"num_heads": 2}, outputs=(0, 1, 2))
    inputs = [q, k, v, mask, None, *past, None, None, None, own[3]]
    check(op_type, inputs, {"num_heads": 2}, expected=wanted, **every)
    attributes = {"num_heads": 2, "past_present_share_buffer": 1}
    buffers, length = [normal(2, 2, 7, 4), normal(2, 2, 7, 4)], np.array([4], np.int32)
    check(op_type, [q, k, v, None, None, *buffers, length], attributes, **every)
    inputs = [q, k, v, mask, normal(1, 2, 1, 5), *buffers, length]
    check("DecoderMaskedMultiHeadAttention", inputs, attributes, **every)
    biased = [q, k, v, mask, None, *buffers, length, None, None, normal(24)]
    check(op_type, biased, attributes, **every)
    check(op_type, [q, normal(2, 2, 6, 4), normal(2, 2, 6, 4)], {"num_heads": 2}, **CLOSE)


def test_one_token_attends_to_the_past_of_the_beam_it_came_from(check, oracle) -> None:
    op_type = "DecoderMaskedMultiHeadAttention"
    q, k, v = normal(2, 1, 8), normal(2, 1, 8), normal(2, 1, 8)
    buffers, length = [normal(2, 2, 7, 4), normal(2, 2, 7, 4)], np.array([4], np.int32)
    beams, width = rng.integers(0, 2, (1, 2, 7)).astype(np.int32), np.array([2], np.int32)
    attributes = {"num_heads": 2, "past_present_share_buffer": 1}
    past = [b[:, :, :4][beams[0, :, :4], :, np.arange(4)].transpose(0, 2, 1, 3) for b in buffers]
    own = [q, k, v, None, None, None, *(np.ascontiguousarray(p) for p in past)]
    # onnxruntime leaves out the past where its outputs are not asked for.
    y, *_ = oracle("MultiHeadAttention", own, {"num_heads": 2}, outputs=(0, 1, 2))
    inputs = [q, k, v, None, None, *buffers, length, width, beams]
    check(op_type, inputs, attributes, expected=[y], **CLOSE)


def test_one_token_with_its_projection_attends_as_in_attention(check, oracle) -> None:
    inputs = [normal(2, 1, 8), normal(8, 24), normal(24), None, normal(2, 2, 2, 4, 4)]
    wanted = oracle("Attention", inputs, {"num_heads": 2}, outputs=(0, 1))
    buffer = np.concatenate((inputs[4], np.zeros((2, 2, 2, 3, 4), np.float32)), 3)
    filled = np.concatenate((wanted[1], np.zeros((2, 2, 2, 2, 4), np.float32)), 3)
    inputs = [*inputs[:4], buffer, None, np.array([4], np.int32)]
    attributes = {"num_heads": 2, "past_present_share_buffer": 1}
    options = {"outputs": (0, 1), "expected": [wanted[0], filled], **CLOSE}
    check("DecoderMaskedSelfAttention", inputs, attributes, **options)


def test_packed_sequences_attend_as_padded_ones(check, oracle) -> None:
    x, weights, bias = normal(2, 5, 8), normal(8, 24), normal(24)
    lengths = np.array([3, 5], np.int32)
    real = (np.arange(5) < lengths[:, None]).ravel()
    order = np.concatenate((np.flatnonzero(real), np.flatnonzero(~real))).astype(np.int32)
    offsets, begins = order.reshape(2, 5), np.array([0, 3, 8], np.int32)
    tokens = x.reshape(10, 8)[real]
    counts = [tokens, offsets, begins, np.array([5], np.int32)]
    check("RemovePadding", [x, lengths], outputs=(0, 1, 2, 3), expected=counts)
    padded = np.where(real[:, None], x.reshape(10, 8), np.float32(0)).reshape(2, 5, 8)
    check("RestorePadding", [tokens, offsets], expected=[padded])
    attributes = {"num_heads": 2}
    (y,) = oracle("Attention", [x, weights, bias, lengths], attributes)
    wanted = [y.reshape(10, 8)[real]]
    inputs = [tokens, weights, bias, offsets, begins]
    check("PackedAttention", inputs, attributes, expected=wanted, **CLOSE)
    q, k, v = (normal(2, 5, 8) for _ in "qkv")
    (y,) = oracle("MultiHeadAttention", [q, k, v, bias, lengths], attributes)
    wanted = [y.reshape(10, 8)[real]]
    q, k, v = (part.reshape(10, 8)[real] for part in (q, k, v))
    inputs = [q, k, v, bias, offsets, begins]
    check("PackedMultiHeadAttention", inputs, attributes, expected=wanted, **CLOSE)
    stacked = np.stack([part.reshape(-1, 2, 4) for part in (q, k, v)], 2)
    inputs = [stacked, None, None, bias, offsets, begins]
    check("PackedMultiHeadAttention", inputs, attributes, expected=wanted, **CLOSE)


@pytest.mark.parametrize("bidirectional", [0, 1])
def test_relative_position_bias_equals_its_formula(check, bidirectional) -> None:
    table, queries, keys, distance = normal(8, 2), 12, 12, 10
    wanted = np.zeros((1, 2, queries, keys), np.float32)
    for i in range(queries):
        for j in range(keys):
            half = 4 if bidirectional else 8
            bucket = half if bidirectional and j > i else 0
            n = abs(j - i) if bidirectional else max(i - j, 0)
            exact = half // 2
            if n >= exact:
                n = exact + int(np.log(n / exact) / np.log(distance / exact) * (half - exact))
            wanted[0, :, i, j] = table.reshape(2, 8)[:, bucket + min(n, half - 1)]
    inputs = [table, np.array([queries]), np.array([keys])]
    attributes = {"max_distance": distance, "is_bidirectional": bidirectional}
    check("RelativePositionBias", inputs, attributes, expected=[wanted])


def test_gated_relative_position_bias_equals_its_formula(check) -> None:
    q, q_bias, positions = normal(2, 5, 8), normal(8), normal(1, 2, 5, 5)
    weight, bias, eco = normal(4, 6), normal(6), normal(1, 2, 1, 1)
    heads = (q + q_bias).reshape(2, 5, 2, 4).transpose(0, 2, 1, 3)
    gates = 1 / (1 + np.exp(-(heads @ weight + bias).reshape(2, 2, 5, 2, 3).sum(-1)))
    wanted = (gates[..., :1] * (gates[..., 1:] * eco - 1) + 2) * positions
    inputs = [q, q_bias, positions, weight, bias, eco]
    check("GatedRelativePositionBias", inputs, {"num_heads": 2}, expected=[wanted], **CLOSE)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_quantized_attention_equals_onnxruntime(check, dtype) -> None:
    info = np.iinfo(dtype)
    x = rng.integers(0, 256, (2, 5, 8)).astype(np.uint8)
    w = rng.integers(info.min, info.max + 1, (8, 24)).astype(dtype)
    zero = np.array(100, np.uint8)
    one = [np.array(0.01, np.float32), np.array(0.02, np.float32)]
    mask = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]], np.int32)
    attributes = {"num_heads": 2, "unidirectional": 1}
    inputs = [x, w, normal(24), *one, mask, zero, np.array(3, dtype)]
    check("QAttention", inputs, attributes, **CLOSE)
    inputs[5] = None
    check("QAttention", inputs, {"num_heads": 2, "scale": 0.2}, **CLOSE)
    many = [one[0], rng.uniform(0.01, 0.02, 24).astype(np.float32)]
    zeros = rng.integers(0, 3, 24).astype(dtype)
    inputs = [x, w, normal(24), *many, None, zero, zeros, normal(2, 2, 2, 3, 4)]
    check("QAttention", inputs, attributes, outputs=(0, 1), **CLOSE)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_quantized_embedding_equals_onnxruntime(check, dtype) -> None:
    info = np.iinfo(dtype)

    def table(*shape: int) -> np.ndarray:
        return rng.integers(info.min, info.max + 1, shape).astype(dtype)

    ids = rng.integers(0, 10, (2, 5)).astype(np.int32)
    segments = rng.integers(0, 2, (2, 5)).astype(np.int32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    tables = [table(10, 8), table(6, 8), table(2, 8), table(8), table(8)]
    scales = [np.array(v, np.float32) for v in rng.uniform(0.01, 0.05, 5)]
    zeros = [table() for _ in range(5)]
    every = {"outputs": (0, 1), **CLOSE}
    inputs = [ids, segments, *tables, mask, *scales, *zeros]
    check("QEmbedLayerNormalization", inputs, {"epsilon": 1e-3}, **every)
    for index in (1, 4, 7, 10, 15):
        inputs[index] = None
    check("QEmbedLayerNormalization", inputs, **every)
