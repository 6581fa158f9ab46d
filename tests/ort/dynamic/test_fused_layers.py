"""Attention and EmbedLayerNormalization, as the transformer optimizer makes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from models_of_text import Weight, batches, parse
from one_operator import attributes_of, constants_of, node_of, run, sqnr
from onnx import ModelProto, TensorProto, numpy_helper
from quantizer_pairs import op_types, quality, quantize_own

HIDDEN = 16
ATTENTION: Mapping[str, Weight] = {"w": (HIDDEN, 3 * HIDDEN), "b": (3 * HIDDEN,)}
TOKENS = "float[2,5,16] x"
DATA = batches({"x": (2, 5, HIDDEN)})


def fused(text: str, weights: Mapping[str, Weight], inputs: str = TOKENS) -> ModelProto:
    model = parse(text, weights, inputs, "float y", contrib=True)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for node in model.graph.node:
        if node.op_type in ("Attention", "EmbedLayerNormalization"):
            node.domain = "com.microsoft"
    return model


@pytest.mark.ort(257, 353)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("weight", ["QInt8", "QUInt8"])
def test_attention_has_its_scales_in_order(weight: str, channels: bool) -> None:
    model = fused("y = Attention<num_heads=2>(x, w, b)", ATTENTION)
    own = quantize_own(model, None, weight=weight, per_channel=channels).model.model
    node = node_of(own, "QAttention")
    assert node.domain == "com.microsoft"
    assert attributes_of(node) == {"num_heads": 2}
    assert list(node.input) == [
        *("x_quantized", "w_quantized", "b", "x_scale", "w_scale", ""),
        *("x_zero_point", "w_zero_point", ""),
    ]
    assert constants_of(own)["w_scale"].size == (3 * HIDDEN if channels else 1)
    assert quality(model, own, DATA) > 30


@pytest.mark.ort(257)
def test_attention_without_bias_gets_one_of_zeros() -> None:
    """The incumbent: IndexError. onnxruntime's float kernel crashes without one."""
    model = fused("y = Attention<num_heads=2>(x, w)", {"w": ATTENTION["w"]})
    own = quantize_own(model, None).model.model
    assert "QAttention" in op_types(own)
    zeros = {"w": ATTENTION["w"], "b": np.zeros(3 * HIDDEN)}
    assert quality(fused("y = Attention<num_heads=2>(x, w, b)", zeros), own, DATA) > 30


@pytest.mark.ort(257)
def test_masked_attention_keeps_its_mask() -> None:
    model = fused("y = Attention<num_heads=2>(x, w, b, m)", {**ATTENTION, "m": np.array([3, 5])})
    mask = model.graph.initializer[2]
    mask.CopyFrom(numpy_helper.from_array(np.array([3, 5], np.int32), "m"))
    own = quantize_own(model, None).model.model
    assert node_of(own, "QAttention").input[5] == "m"
    assert quality(model, own, DATA) > 30


UNKNOWN = {
    "y = Attention<num_heads=2, qkv_hidden_sizes=[16,16,16]>(x, w, b)": "one hidden size",
    "y = Attention<num_heads=2>(x, w, b, , , extra)": "no bias to scores",
    "v = Tanh(w) y = Attention<num_heads=2>(x, v, b)": "not constant",
}


@pytest.mark.ort(257)
@pytest.mark.parametrize("text", UNKNOWN)
def test_attention_that_the_kernel_does_not_have_stays_float(text: str) -> None:
    """The incumbent drops the bias of the scores, silently."""
    model = fused(text, {**ATTENTION, "extra": (2, 2, 5, 5)})
    quantizer = quantize_own(model, None)
    assert "Attention" in op_types(quantizer.model.model)
    assert UNKNOWN[text] in quantizer.report.nodes[-1].reason
    assert quality(model, quantizer.model.model, DATA) > 60


@pytest.mark.ort(257)
def test_the_attention_of_onnx_itself_is_another_operator() -> None:
    """The incumbent takes it for the contrib operator of that name."""
    model = parse("y = Attention(x, x, x)", {}, "float[2,2,5,8] x", "float y", opset=23)
    model.ir_version = 10
    model.graph.output[0].type.tensor_type.ClearField("shape")
    quantizer = quantize_own(model, None)
    assert op_types(quantizer.model.model) == ["Attention"]


@pytest.mark.ort("G42", 353)
def test_float16_attention_computes_in_float32() -> None:
    model = fused("y = Attention<num_heads=2>(x, w, b)", ATTENTION)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    own = quantize_own(model, None).model.model
    plain = quantize_own(fused("y = Attention<num_heads=2>(x, w, b)", ATTENTION), None)
    data = [{"x": batch["x"].astype(np.float16)} for batch in DATA]

    for batch, narrow in zip(DATA, data, strict=True):
        assert sqnr(run(plain.model.model, batch), run(own, narrow)) > 30


EMBED = {
    "words": (30, HIDDEN),
    "places": (8, HIDDEN),
    "segments": (2, HIDDEN),
    "gamma": (HIDDEN,),
    "beta": (HIDDEN,),
}
IDS = "int32[2,5] ids, int32[2,5] kinds"
FEEDS = [
    {"ids": np.arange(10, dtype=np.int32).reshape(2, 5), "kinds": np.ones((2, 5), np.int32)},
]
TABLES = "words, places, segments, gamma, beta"


@pytest.mark.ort(248, 260)
@pytest.mark.parametrize("static", [True, False])
def test_embeddings_have_eighteen_inputs(static: bool) -> None:
    text = f"y, mask = EmbedLayerNormalization(ids, kinds, {TABLES})"
    model = fused(text, EMBED, IDS)
    own = quantize_own(model, {} if static else None).model.model
    node = node_of(own, "QEmbedLayerNormalization")
    assert len(node.input) == 18
    assert list(node.input)[2:7] == [f"{name}_quantized" for name in EMBED]
    assert quality(model, own, FEEDS) > 30


@pytest.mark.ort(248)
def test_embeddings_without_segments_have_empty_names() -> None:
    text = "y, m = EmbedLayerNormalization(ids, , words, places, , gamma, beta)"
    model = fused(text, EMBED, IDS)
    own = quantize_own(model, None).model.model
    node = node_of(own, "QEmbedLayerNormalization")
    assert [i for i, name in enumerate(node.input) if not name] == [1, 4, 7, 10, 15]
    assert quality(model, own, FEEDS) > 30


@pytest.mark.ort(248)
@pytest.mark.parametrize(
    "text",
    [
        f"y, m, sums = EmbedLayerNormalization(ids, kinds, {TABLES})",
        f"y, m = EmbedLayerNormalization<mask_index_type=0>(ids, kinds, {TABLES})",
        f"y, m = EmbedLayerNormalization(ids, kinds, {TABLES}, , where)",
    ],
)
def test_embeddings_that_the_kernel_does_not_have_stay_float(text: str) -> None:
    where = np.tile(np.arange(5), (2, 1))
    model = fused(text, {**EMBED, "where": where}, IDS)
    constant = model.graph.initializer[-1]
    constant.CopyFrom(numpy_helper.from_array(where.astype(np.int32), "where"))
    own = quantize_own(model, None).model.model
    assert op_types(own) == ["EmbedLayerNormalization"]
    assert quality(model, own, FEEDS) > 60
