"""The table of one-operator models: every type that onnxruntime's two registries know, and chains.

Operators that only pass codes on come after a Conv or a MatMul, for they are quantized where their
input is. Names of cases that end in ``_alone`` are those operators without one.
"""

from __future__ import annotations

import numpy as np
from one_operator import Case

IMAGE = {"x": (-1, 3, 8, 8)}
ROWS = {"x": (-1, 16)}
TOKENS = {"x": (-1, 5, 16)}
CONV = {"w": (4, 3, 3, 3), "b": (4,)}
LINEAR = {"w": (16, 8), "b": (8,)}
H = "h = Conv<pads=[1,1,1,1]>(x, w, b) "
R = "h = MatMul(x, w) "


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def after_conv(
    nodes: str | dict[int, str],
    rank: int = 4,
    weights: dict[str, tuple[int, ...] | np.ndarray] | None = None,
    **settings: object,
) -> Case:
    """A case whose operator reads ``h``, the output of a Conv."""
    texts = H + nodes if isinstance(nodes, str) else {k: H + text for k, text in nodes.items()}
    return Case(texts, IMAGE, {"y": rank}, {**CONV, **(weights or {})}, **settings)  # type: ignore[arg-type]


def alone(nodes: str | dict[int, str], rank: int = 4, **settings: object) -> Case:
    """A case whose operator reads the graph's input, an image."""
    return Case(nodes, IMAGE, {"y": rank}, **settings)  # type: ignore[arg-type]


F32 = np.float32
LAYERS = {
    "Conv": Case("y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b)", IMAGE, {"y": 4}, CONV),
    "Conv_without_bias": Case("y = Conv(x, w)", IMAGE, {"y": 4}, {"w": (4, 3, 3, 3)}),
    "Conv_grouped": Case(
        "y = Conv<group=3>(x, w, b)", IMAGE, {"y": 4}, {"w": (6, 1, 3, 3), "b": (6,)}
    ),
    "Conv_1d": Case("y = Conv(x, w, b)", {"x": (-1, 3, 9)}, {"y": 3}, {"w": (4, 3, 3), "b": (4,)}),
    "ConvTranspose": Case(
        "y = ConvTranspose<strides=[2,2]>(x, w, b)",
        IMAGE,
        {"y": 4},
        {"w": (3, 4, 3, 3), "b": (4,)},
    ),
    "Gemm": Case("y = Gemm(x, w, b)", ROWS, {"y": 2}, LINEAR),
    "Gemm_transposed": Case(
        "y = Gemm<transB=1>(x, w, b)", ROWS, {"y": 2}, {"w": (8, 16), "b": (8,)}
    ),
    "Gemm_without_bias": Case({11: "y = Gemm(x, w)"}, ROWS, {"y": 2}, {"w": (16, 8)}),
    "MatMul": Case("y = MatMul(x, w)", ROWS, {"y": 2}, {"w": (16, 8)}),
    "MatMul_tokens": Case("y = MatMul(x, w)", TOKENS, {"y": 3}, {"w": (16, 8)}),
    "MatMul_of_activations": Case(
        "y = MatMul(x, z)", {"x": (-1, 5, 16), "z": (-1, 16, 7)}, {"y": 3}
    ),
    "MatMul_constant_left": Case("y = MatMul(w, x)", TOKENS, {"y": 3}, {"w": (8, 5)}),
}
ELEMENTWISE = {
    "Add": alone("y = Add(x, x)"),
    "Add_constant": Case("y = Add(x, c)", IMAGE, {"y": 4}, {"c": (3, 1, 1)}),
    "Mul": after_conv("y = Mul(h, c)", weights={"c": (4, 1, 1)}),
    "Relu": after_conv("y = Relu(h)"),
    "Relu_alone": alone("y = Relu(x)"),
    "Clip": after_conv(
        {
            10: "y = Clip<min=0.0, max=6.0>(h)",
            11: "y = Clip(h, low, high)",
        },
        weights={"low": np.array(0.0), "high": np.array(6.0)},
    ),
    "LeakyRelu": alone("y = LeakyRelu<alpha=0.2>(x)"),
    "Sigmoid": alone("y = Sigmoid(x)"),
    "Softmax": Case("y = Softmax<axis=1>(x)", ROWS, {"y": 2}),
    "CumSum": Case({11: "y = CumSum(x, axis)"}, ROWS, {"y": 2}, {"axis": ints(1)}, half=False),
    "Where": Case(
        "c = Greater(x, z) y = Where(c, x, z)",
        {"x": (-1, 16), "z": (-1, 16)},
        {"y": 2},
    ),
    "Where_after_Add": Case(
        "a = Add(x, z) c = Greater(x, z) d = Mul(x, z) y = Where(c, a, d)",
        {"x": (-1, 16), "z": (-1, 16)},
        {"y": 2},
    ),
}
MOVES = {
    "Reshape": after_conv("y = Reshape(h, shape)", 2, {"shape": ints(0, -1)}),
    "Transpose": after_conv("y = Transpose<perm=[0,2,3,1]>(h)"),
    "Transpose_alone": alone("y = Transpose<perm=[0,2,3,1]>(x)"),
    "Squeeze": after_conv(
        {
            10: "u = Unsqueeze<axes=[0]>(h) y = Squeeze<axes=[0]>(u)",
            13: "u = Unsqueeze(h, axes) y = Squeeze(u, axes)",
        },
        weights={"axes": ints(0)},
    ),
    "Unsqueeze": after_conv(
        {10: "y = Unsqueeze<axes=[0]>(h)", 13: "y = Unsqueeze(h, axes)"},
        5,
        {"axes": ints(0)},
    ),
    "Flatten": after_conv("y = Flatten(h)", 2),
    "Slice": after_conv(
        "y = Slice(h, starts, ends, axes)",
        weights={"starts": ints(1), "ends": ints(3), "axes": ints(1)},
    ),
    "Split": after_conv(
        {
            10: "p, q = Split<axis=1, split=[1,3]>(h) y = Concat<axis=1>(q, p)",
            13: "p, q = Split<axis=1>(h, sizes) y = Concat<axis=1>(q, p)",
        },
        weights={"sizes": ints(1, 3)},
    ),
    "Concat": after_conv("y = Concat<axis=1>(h, x)"),
    "Pad": after_conv(
        {
            10: "y = Pad<pads=[0,0,1,1,0,0,1,1]>(h)",
            11: "y = Pad(h, pads)",
        },
        weights={"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    "Pad_reflect": after_conv(
        {11: 'y = Pad<mode="reflect">(h, pads)'},
        weights={"pads": ints(0, 0, 1, 1, 0, 0, 1, 1)},
    ),
    "Pad_value": after_conv(
        {11: "y = Pad(h, pads, value)"},
        weights={"pads": ints(0, 0, 1, 1, 0, 0, 1, 1), "value": np.array(0.5)},
    ),
    "Gather": Case(
        "y = Gather(table, ids)",
        {"ids": (-1, 4)},
        {"y": 3},
        {"table": (12, 8)},
        integers={"ids": 12},
    ),
    "Gather_after_Conv": after_conv("y = Gather<axis=1>(h, at)", weights={"at": ints(0, 2)}),
    "GatherElements": Case(
        {11: "y = GatherElements(table, ids)"},
        {"ids": (-1, 8)},
        {"y": 2},
        {"table": (12, 8)},
        integers={"ids": 12},
    ),
    "TopK": after_conv("y, i = TopK(h, k)", weights={"k": ints(2)}),
    "ArgMax": after_conv("a = ArgMax<axis=1>(h) y = Cast<to=1>(a)", half=False),
}
POOLS = {
    "MaxPool": after_conv("y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)"),
    "MaxPool_alone": alone("y = MaxPool<kernel_shape=[2,2]>(x)"),
    "AveragePool": after_conv("y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h)"),
    "AveragePool_alone": alone("y = AveragePool<kernel_shape=[2,2]>(x)"),
    "GlobalAveragePool": after_conv("y = GlobalAveragePool(h)"),
    "Resize": after_conv(
        {
            10: 'y = Resize<mode="nearest">(h, scales)',
            11: 'y = Resize<mode="nearest", nearest_mode="floor",'
            ' coordinate_transformation_mode="asymmetric">(h, roi, scales)',
        },
        weights={"scales": np.array([1, 1, 2, 2], F32), "roi": np.zeros(0)},
    ),
}
NORMALS = {
    "BatchNormalization": after_conv(
        "y = BatchNormalization(h, s, t, mean, variance)",
        weights={"s": (4,), "t": (4,), "mean": (4,), "variance": np.array([1.0, 2.0, 0.5, 1.5])},
    ),
    "InstanceNormalization": after_conv(
        "y = InstanceNormalization(h, s, t)", weights={"s": (4,), "t": (4,)}
    ),
    "LayerNormalization": Case(
        {17: "y = LayerNormalization(x, s, t)"}, TOKENS, {"y": 3}, {"s": (16,), "t": (16,)}
    ),
}
MICROSOFT = ("com.microsoft",)
CONTRIB = {
    "EmbedLayerNormalization": Case(
        "i = Cast<to=6>(ids) s = Cast<to=6>(segments) y, m = com.microsoft.EmbedLayerNormalization"
        "(i, s, words, places, kinds, gamma, beta)",
        {"ids": (-1, 4), "segments": (-1, 4)},
        {"y": 3},
        {
            "words": (12, 8),
            "places": (4, 8),
            "kinds": (2, 8),
            "gamma": np.linspace(0.5, 1.5, 8),
            "beta": (8,),
        },
        integers={"ids": 12, "segments": 2},
        domains=MICROSOFT,
        half=False,
    ),
    "Attention": Case(
        "y = com.microsoft.Attention<num_heads=2>(x, w, b)",
        TOKENS,
        {"y": 3},
        {"w": (16, 48), "b": (48,)},
        domains=MICROSOFT,
        half=False,
    ),
    "LSTM": Case(
        "all, y, c = LSTM<hidden_size=4>(x, w, r, b)",
        {"x": (5, -1, 16)},
        {"y": 3},
        {"w": (1, 16, 16), "r": (1, 16, 4), "b": (1, 32)},
        half=False,
    ),
    "LSTM_bidirectional": Case(
        'all, y, c = LSTM<hidden_size=4, direction="bidirectional">(x, w, r, b)',
        {"x": (5, -1, 16)},
        {"y": 3},
        {"w": (2, 16, 16), "r": (2, 16, 4), "b": (2, 32)},
        half=False,
    ),
}
CHAINS = {
    "Conv_Relu_Conv": after_conv(
        "r = Relu(h) y = Conv(r, w2, b2)", weights={"w2": (5, 4, 3, 3), "b2": (5,)}
    ),
    "residual": after_conv(
        "r = Relu(h) s = Conv<pads=[1,1,1,1]>(r, w2, b2) t = Add(s, h) y = Relu(t)",
        weights={"w2": (4, 4, 3, 3), "b2": (4,)},
    ),
    "Conv_to_head": after_conv(
        "r = Relu(h) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, w2, b2)",
        2,
        {"w2": (4, 6), "b2": (6,)},
    ),
    "three_readers": after_conv("p = Relu(h) q = Sigmoid(h) r = Add(h, p) y = Mul(q, r)"),
    "shared_bias": Case(
        "h = Conv(x, w, b) y = Conv(h, v, b)",
        IMAGE,
        {"y": 4},
        {**CONV, "v": (4, 4, 3, 3)},
    ),
    "tied_weights": Case("h = MatMul(x, w) y = MatMul(h, w)", ROWS, {"y": 2}, {"w": (16, 16)}),
    "two_MatMuls_of_one_input": Case(
        "p = MatMul(x, w) q = MatMul(x, v) y = Add(p, q)",
        TOKENS,
        {"y": 3},
        {"w": (16, 8), "v": (16, 8)},
    ),
    "attention_of_MatMuls": Case(
        "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose<perm=[0,2,1]>(k) "
        "s = MatMul(q, kt) p = Softmax<axis=-1>(s) o = MatMul(p, v) y = Add(o, x)",
        TOKENS,
        {"y": 3},
        {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16)},
    ),
    "a_type_not_listed": after_conv("t = Tanh(h) y = Sub(t, x3)", weights={"x3": (4, 1, 1)}),
}
CASES: dict[str, Case] = {
    **LAYERS,
    **ELEMENTWISE,
    **MOVES,
    **POOLS,
    **NORMALS,
    **CONTRIB,
    **CHAINS,
}
