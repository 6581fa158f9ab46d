"""Float operators of com.microsoft against onnxruntime, or a formula where it has no CPU kernel."""

import math

import numpy as np
import pytest

rng = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


# A few roundings of float32; sums run in another order.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
SUMS = {"rtol": 1e-5, "atol": 1e-5}


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x.astype(np.float64) / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_gelus_equal_onnxruntime(check) -> None:
    x, b = 3 * normal(2, 3, 8), normal(8)
    check("Gelu", [x], **CLOSE)
    check("BiasGelu", [x, b], **CLOSE)
    check("FastGelu", [x], **CLOSE)
    check("FastGelu", [x, b], **CLOSE)
    check("QuickGelu", [x], **CLOSE)
    check("QuickGelu", [x], {"alpha": 0.5}, **CLOSE)


def test_gates_equal_onnxruntime(check) -> None:
    x = normal(2, 3, 8)
    check("ScaledSiLU", [x], {"alpha": 0.7}, **CLOSE)
    check("ScaledSiLU", [x, np.array(2.5, np.float32)], **CLOSE)
    check("GatedAdd", [x, normal(2, 3, 8), normal(2, 3, 1)], **CLOSE)


def test_biased_activations_equal_their_formulas(check) -> None:
    x, b, s = normal(2, 3, 8), normal(8), normal(2, 3, 8)
    check("BiasAdd", [x, b, s], expected=[x + b + s], **CLOSE)
    left, right = np.split(x + b, 2, -1)
    wanted = (left * gelu(right)).astype(np.float32)
    check("BiasSplitGelu", [x, b], expected=[wanted], **CLOSE)
    check("BiasDropout", [x, b, s], expected=[x + b + s], **CLOSE)
    check("BiasDropout", [x, b], {"seed": 1}, outputs=(0, 1), expected=[x + b, x > -np.inf])
    w = normal(8, 5)
    wanted = x @ w + b[:5]
    wanted = wanted * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wanted + 0.044715 * wanted**3)))
    check("GemmFastGelu", [x, w, b[:5].copy()], expected=[wanted], **SUMS)


@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (1, 3, 4, 5), (4, 5)])
def test_bias_softmax_is_the_softmax_of_the_sum(check, shape) -> None:
    x, bias = normal(2, 3, 4, 5), normal(*shape)
    attributes = {"axis": 3, "is_inner_broadcast": int(shape[0] == 2)}
    check("BiasSoftmax", [x, bias], attributes, expected=[softmax(x + bias)], **CLOSE)
    whole = softmax((x + bias).reshape(2, 3, -1)).reshape(x.shape)
    check("BiasSoftmax", [x, bias], {**attributes, "axis": 2}, expected=[whole], **CLOSE)


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization_before_opset_17_equals_onnxruntime(check, axis) -> None:
    x = normal(2, 3, 8)
    scale, bias = normal(*x.shape[axis:]), normal(*x.shape[axis:])
    options = {"domain": "", "opset": 13, **SUMS}
    attributes = {"axis": axis, "epsilon": 1e-3}
    check("LayerNormalization", [x, scale, bias], attributes, **options)
    check("LayerNormalization", [x, scale], attributes, outputs=(0, 1, 2), **options)
    check("SimplifiedLayerNormalization", [x, scale], attributes, **options)
    check("SimplifiedLayerNormalization", [x, scale], attributes, outputs=(0, 1), **options)


@pytest.mark.parametrize("skip", [(2, 3, 8), (1, 3, 8), (3, 8)])
def test_skip_layer_normalization_equals_onnxruntime(check, skip) -> None:
    x, s, gamma, beta, bias = normal(2, 3, 8), normal(*skip), normal(8), normal(8), normal(8)
    check("SkipLayerNormalization", [x, s, gamma], **SUMS)
    check("SkipLayerNormalization", [x, s, gamma, beta, bias], {"epsilon": 0.01}, **SUMS)
    check("SkipLayerNormalization", [x, s, gamma, None, bias], outputs=(0, 3), **SUMS)
    check("SkipSimplifiedLayerNormalization", [x, s, gamma], {"epsilon": 0.01}, **SUMS)
    check("SkipSimplifiedLayerNormalization", [x, s, gamma, bias], outputs=(0, 3), **SUMS)


def test_half_precision_norms_equal_onnxruntime(check) -> None:
    x, s, gamma = (a.astype(np.float16) for a in (normal(2, 3, 8), normal(2, 3, 8), normal(8)))
    half = {"rtol": 2e-3, "atol": 2e-3}  # two roundings to float16
    check("SkipLayerNormalization", [x, s, gamma], outputs=(0, 3), **half)
    check("SkipSimplifiedLayerNormalization", [x, s, gamma], outputs=(0, 3), **half)


def test_embed_layer_normalization_equals_onnxruntime(check) -> None:
    ids = rng.integers(0, 10, (2, 5)).astype(np.int32)
    segments = rng.integers(0, 2, (2, 5)).astype(np.int32)
    words, positions, kinds, gamma, beta = (normal(n, 8) for n in (10, 6, 2, 1, 1))
    gamma, beta = gamma[0], beta[0]
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], np.int32)
    inputs = [ids, segments, words, positions, kinds, gamma, beta]
    check("EmbedLayerNormalization", inputs, outputs=(0, 1), **SUMS)
    check("EmbedLayerNormalization", [*inputs, mask], {"epsilon": 1e-3}, outputs=(0, 1, 2), **SUMS)
    chosen = rng.integers(0, 6, (2, 5)).astype(np.int32)
    check("EmbedLayerNormalization", [*inputs, None, chosen], {"mask_index_type": 0}, **SUMS)
    check("EmbedLayerNormalization", [*inputs, mask, chosen[:1].copy()], outputs=(0, 1), **SUMS)
    plain = [ids, None, words, positions, None, gamma, beta]
    check("EmbedLayerNormalization", plain, {"mask_index_type": 0}, **SUMS)


@pytest.mark.parametrize("channels_last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
def test_group_norm_equals_its_formula(check, channels_last, activation) -> None:
    x, gamma, beta, skip, bias = normal(2, 3, 4, 6), normal(6), normal(6), normal(2, 6), normal(6)

    def formula(v: np.ndarray) -> np.ndarray:
        g = v.reshape(2, 12, 2, 3)
        mean, var = g.mean((1, 3), keepdims=True), g.var((1, 3), keepdims=True)
        y = ((g - mean) / np.sqrt(var + 1e-3)).reshape(v.shape) * gamma + beta
        return y / (1 + np.exp(-y)) if activation else y

    def laid(v: np.ndarray) -> np.ndarray:
        return v if channels_last else np.ascontiguousarray(v.transpose(0, 3, 1, 2))

    attributes = {
        "groups": 2,
        "activation": activation,
        "channels_last": channels_last,
        "epsilon": 1e-3,
    }
    expected = [laid(formula(x))]
    check("GroupNorm", [laid(x), gamma, beta], attributes, expected=expected, **SUMS)
    for added in (skip, laid(skip.reshape(2, 1, 1, 6)), laid(normal(*x.shape))):
        as_last = added if channels_last or added.ndim == 2 else added.transpose(0, 2, 3, 1)
        total = x + (as_last.reshape(2, 1, 1, 6) if as_last.ndim == 2 else as_last)
        wanted = [laid(formula(total)), laid(total)]
        inputs = [laid(x), gamma, beta, added]
        check("SkipGroupNorm", inputs, attributes, outputs=(0, 1), expected=wanted, **SUMS)
    wanted = [laid(formula(x + skip.reshape(2, 1, 1, 6) + bias))]
    inputs = [laid(x), gamma, beta, skip, bias]
    check("SkipGroupNorm", inputs, attributes, expected=wanted, **SUMS)


MATMULS = [
    ((3, 4), (4, 5), {}),
    ((2, 3, 4), (4, 5), {"alpha": 0.5}),
    ((2, 4, 3), (2, 4, 5), {"transA": 1}),
    ((2, 3, 4), (5, 4), {"transB": 1, "alpha": -2.0}),
    ((3, 2, 4), (2, 4, 5), {"transBatchA": 1}),
    ((3, 2, 6, 4), (5, 2, 6, 4), {"transBatchA": 1, "transB": 1, "transBatchB": 1}),
    ((4, 2, 3), (4, 2, 5), {"transBatchA": 1, "transA": 1, "transBatchB": 1}),
    ((4,), (4, 5), {"transA": 1}),
    ((3, 4), (4,), {"transB": 1}),
]


@pytest.mark.parametrize(("a", "b", "attributes"), MATMULS)
def test_fused_matmul_equals_onnxruntime(check, a, b, attributes) -> None:
    check("FusedMatMul", [normal(*a), normal(*b)], attributes, **SUMS)
    if not any("Batch" in name for name in attributes):
        check("TransposeMatMul", [normal(*a), normal(*b)], attributes, **SUMS)


def test_fused_matmul_activation_equals_its_formula(check) -> None:
    a, b = normal(2, 3, 4), normal(4, 5)
    y = 0.5 * (a @ b)
    attributes = {"alpha": 0.5, "activation": "LeakyRelu", "activation_alpha": 0.2}
    check("FusedMatMulActivation", [a, b], attributes, expected=[np.maximum(y, 0.2 * y)], **SUMS)


FUSED = [
    ("Relu", []),
    ("Tanh", []),
    ("Sigmoid", []),
    ("LeakyRelu", [0.2]),
    ("HardSigmoid", [0.3, 0.4]),
]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        *FUSED,
        ("Elu", [0.7]),
        ("Softplus", []),
        ("Softsign", []),
        ("ThresholdedRelu", [0.3]),
        ("Celu", [0.5]),
        ("Selu", [1.5, 0.0, 1.1]),
    ],
)
def test_fused_gemm_equals_onnxruntime(check, name, numbers) -> None:
    attributes = {"activation": name, "alpha": 0.5, "beta": 2.0, "transB": 1}
    keys = ("activation_alpha", "activation_beta", "activation_gamma")
    attributes |= dict(zip(keys, numbers, strict=False))
    check("FusedGemm", [normal(3, 4), normal(5, 4), normal(5)], attributes, **SUMS)


@pytest.mark.parametrize(("name", "numbers"), [*FUSED, ("Clip", [-0.5, 0.8])])
def test_fused_conv_equals_onnxruntime(check, name, numbers) -> None:
    x, w, b, z = normal(2, 4, 6, 5), normal(6, 2, 3, 3), normal(6), normal(2, 6, 6, 5)
    attributes = {"group": 2, "pads": [1, 1, 1, 1], "kernel_shape": [3, 3], "activation": name}
    if numbers:
        attributes["activation_params"] = numbers
    check("FusedConv", [x, w, b], attributes, **SUMS)
    check("FusedConv", [x, w, b, z], attributes, **SUMS)
    strided = {"strides": [2, 2], "auto_pad": "SAME_LOWER", "group": 2}
    check("FusedConv", [x, w], strided, **SUMS)


def test_channels_last_convolution_is_convolution(check, oracle) -> None:
    x, w, b = normal(2, 4, 6, 5), normal(6, 2, 3, 3), normal(6)
    attributes = {"group": 2, "pads": [1, 0, 2, 1], "strides": [1, 2]}
    (y,) = oracle("Conv", [x, w, b], attributes, domain="")
    x, y = (np.ascontiguousarray(v.transpose(0, 2, 3, 1)) for v in (x, y))
    z = normal(*y.shape)
    check("NhwcConv", [x, w, b], attributes, expected=[y], **SUMS)
    check("NhwcFusedConv", [x, w, b], attributes, expected=[y], **SUMS)
    attributes |= {"activation": "Relu"}
    check("NhwcFusedConv", [x, w, b, z], attributes, expected=[np.maximum(y + z, 0)], **SUMS)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_channels_last_max_pool_equals_onnxruntime(check, dtype) -> None:
    x = rng.integers(-100, 100, (2, 7, 6, 3)).astype(dtype)
    check("NhwcMaxPool", [x], {"kernel_shape": [3, 2], "strides": [2, 2]})
    padded = {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1], "ceil_mode": 1, "strides": [2, 2]}
    check("NhwcMaxPool", [x], padded)
    check("NhwcMaxPool", [x], {"kernel_shape": [2, 2], "dilations": [2, 2]})
    check("NhwcMaxPool", [x], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"})


def test_conv_transpose_with_dynamic_pads_equals_onnxruntime(check) -> None:
    x, w, b = normal(1, 2, 4, 5), normal(2, 3, 3, 3), normal(3)
    pads = np.array([1, 0, 0, 1])
    attributes = {"strides": [2, 2], "output_padding": [1, 0], "kernel_shape": [3, 3]}
    check("ConvTransposeWithDynamicPads", [x, w, pads, b], attributes, **SUMS)
