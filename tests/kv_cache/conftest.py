"""A small decoder with caches, and a loop that runs it token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

Arrays = dict[str, np.ndarray]
HEADS, SIZE, WIDTH, WORDS = 2, 8, 16, 20
NUMPY = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
WEIGHTS = {
    "table": (WORDS, WIDTH),
    "wq": (WIDTH, WIDTH),
    "wk": (WIDTH, WIDTH),
    "wv": (WIDTH, WIDTH),
    "wo": (WIDTH, WORDS),
}
NUMBERS = {"split": [0, 0, HEADS, SIZE], "merge": [0, 0, WIDTH], "one": [1]}

PROJECTED = """
    x = Gather(table, input_ids)
    q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    q1 = Reshape(q0, split) k1 = Reshape(k0, split) v1 = Reshape(v0, split)
    q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,1,3]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)
"""
JOINED = """
    present_0_key = Concat<axis=2>(past_0_key, k)
    present_0_value = Concat<axis=2>(past_0_value, v)
"""
ATTENDED = """
    kt = Transpose<perm=[0,1,3,2]>(present_0_key)
    s = MatMul(q, kt) s_shape = Shape(s)
    low = ConstantOfShape<value = float[1] {-1e9}>(s_shape)
    total = Shape<start=2, end=3>(present_0_key) new = Shape<start=1, end=2>(input_ids)
    before = Sub(total, new) next = Add(before, one) next0 = Squeeze(next)
    mask = Trilu<upper=1>(low, next0) masked = Add(s, mask)
    p = Softmax<axis=-1>(masked) o = MatMul(p, present_0_value)
"""
MERGED = """
    o1 = Transpose<perm=[0,2,1,3]>(o) o2 = Reshape(o1, merge) logits = MatMul(o2, wo)
"""
LAYER = PROJECTED + JOINED + ATTENDED + MERGED


def make_decoder(
    nodes: str = LAYER,
    opset: int = 17,
    past: str = "float[batch,2,past,8]",
    inputs: str = "",
    names: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """One layer of causal attention whose keys and values are caches.

    Args:
        nodes: of the layer.
        opset: of ai.onnx.
        past: type of the caches.
        inputs: further graph inputs.
        names: graph input or output -> what else to call it.
    """
    present = past.replace("past", "all")
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]> decoder (
        int64[batch,tokens] input_ids, {past} past_0_key, {past} past_0_value{inputs}) =>
        (float[batch,tokens,20] logits, {present} present_0_key, {present} present_0_value)
        {{{nodes}}}"""
    )
    for name, new in (names or {}).items():
        _rename(model.graph, name, new)
    rng = np.random.default_rng(3)
    for name, shape in WEIGHTS.items():
        array = rng.normal(0, 1 / np.sqrt(WIDTH) if name != "table" else 1, shape)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    for name, numbers in NUMBERS.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(numbers), name))
    return model


def _rename(graph: onnx.GraphProto, name: str, new: str) -> None:
    for value in (*graph.input, *graph.output):
        value.name = new if value.name == name else value.name
    for node in graph.node:
        node.input[:] = [new if each == name else each for each in node.input]
        node.output[:] = [new if each == name else each for each in node.output]
        for attribute in node.attribute:
            _rename(attribute.g, name, new)


class Decoder:
    """A file in onnxruntime, its caches fed back to it."""

    def __init__(self, model: Path | onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        self.session = onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )
        inputs = self.session.get_inputs()
        self.caches = {i.name: i for i in inputs if len(i.shape) >= 3}
        self.types = {name: i.type for name, i in self.caches.items()}

    def empty(self, batch: int = 1) -> Arrays:
        """The caches before the first token."""
        found = {}
        for name, cache in self.caches.items():
            sizes = [n if isinstance(n, int) else 0 for n in cache.shape]
            sizes[0] = batch
            found[name] = np.zeros(sizes, NUMPY[cache.type])
        return found

    def run(
        self, ids: np.ndarray, chunk: int = 1, past: Arrays | None = None
    ) -> tuple[np.ndarray, Arrays]:
        """Logits of all tokens, and the caches after them."""
        past, logits = past or self.empty(len(ids)), []
        for start in range(0, ids.shape[1], chunk):
            feed = {"input_ids": ids[:, start : start + chunk], **past}
            first, *presents = self.session.run(None, feed)
            logits.append(first)
            past = dict(zip(past, presents, strict=True))
        return np.concatenate(logits, 1), past


def tokens(count: int = 24, batch: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, WORDS, (batch, count))


class Caches:
    """What tests make decoders with."""

    model = staticmethod(make_decoder)
    decoder = Decoder
    tokens = staticmethod(tokens)
    projected, joined, attended, merged = PROJECTED, JOINED, ATTENDED, MERGED

    @staticmethod
    def batches(count: int = 4) -> list[Arrays]:
        return [{"input_ids": tokens(24, 2, seed=9 + i)} for i in range(count)]


@pytest.fixture(scope="session")
def kv() -> Caches:
    return Caches()
