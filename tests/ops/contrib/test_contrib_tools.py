"""Files as onnxruntime's optimizers and quantizers write them, loaded and compared with it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper, parser
from torch import Tensor, nn

import qwrap.backend

quantization = pytest.importorskip("onnxruntime.quantization", reason="not part of this build")
optimizer = pytest.importorskip("onnxruntime.transformers.optimizer", reason="not in this build")
nbits = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
bnb4 = pytest.importorskip("onnxruntime.quantization.matmul_bnb4_quantizer")

# The quantizers advise through warnings and logging.
pytestmark = pytest.mark.filterwarnings("ignore")

Feed = dict[str, np.ndarray]
CLOSE = 5e-6  # sums of float32 in another order, values up to 3


CNN = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 16, 16] x) => (float[N, 10] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    b = Relu (a)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
    c = Conv <pads = [1, 1, 1, 1]> (p, w2, b2)
    d = LeakyRelu (c)
    e = Add (d, p)
    f = Sigmoid (e)
    h = Mul (e, f)
    j = Concat <axis = 1> (h, p)
    k = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (j)
    l = GlobalAveragePool (k)
    m = Flatten (l)
    n = Gemm <transB = 1> (m, w3, b3)
    y = Softmax (n)
}"""
SHAPES = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 3, 3),
    "b2": (8,),
    "w3": (10, 16),
    "b3": (10,),
}


def cnn(folder: Path) -> tuple[Path, Feed]:
    rng = np.random.default_rng(0)
    model = parser.parse_model(CNN)
    for name, shape in SHAPES.items():
        weight = (0.3 * rng.normal(size=shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(model, folder / "cnn.onnx")
    return folder / "cnn.onnx", {"x": rng.normal(size=(2, 3, 16, 16)).astype(np.float32)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.inner, self.outer = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        size = x.shape[:2]
        q, k, v = (f(x).view(*size, 4, 8).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        shares = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8) + mask, -1)
        heads = (shares @ v).permute(0, 2, 1, 3).contiguous().view(*size, 32)
        x = self.norm1(self.o(heads) + x)
        h = self.inner(x)
        h = h * 0.5 * (1.0 + torch.erf(h / 1.41421))
        return self.norm2(self.outer(h) + x)


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.places = (nn.Embedding(n, 32) for n in (50, 2, 20))
        self.norm = nn.LayerNorm(32)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.register_buffer("positions", torch.arange(20)[None])

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor) -> Tensor:
        added = (1.0 - mask[:, None, None, :].to(torch.float32)) * -10000.0
        places = self.places(self.positions[:, : ids.shape[1]])
        x = self.norm(self.words(ids) + self.kinds(kinds) + places)
        for layer in self.layers:
            x = layer(x, added)
        return x


@cache
def exported(opset: int) -> bytes:
    torch.manual_seed(0)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    file = io.BytesIO()
    names = ["ids", "kinds", "mask"]
    torch.onnx.export(
        Bert().eval(),
        (ids, ids, ids),
        file,
        dynamo=False,
        opset_version=opset,
        input_names=names,
        output_names=["y"],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
    )
    return file.getvalue()


def bert(folder: Path, opset: int = 14) -> tuple[Path, Feed]:
    rng = np.random.default_rng(1)
    (folder / "bert.onnx").write_bytes(exported(opset))
    mask = np.array([[1] * 5 + [0] * 3, [1] * 8])
    return folder / "bert.onnx", {
        "ids": rng.integers(0, 50, (2, 8)),
        "kinds": rng.integers(0, 2, (2, 8)),
        "mask": mask,
    }


class Once:
    """A calibration set of one batch."""

    def __init__(self, batch: Feed) -> None:
        self._batches = iter([batch])

    def get_next(self) -> Feed | None:
        return next(self._batches, None)


def optimized_by_session(source: Path, target: Path, level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def assert_equals_onnxruntime(
    path: Path, feed: Feed, operators: Iterable[str], tolerance: float = CLOSE
) -> None:
    model = onnx.load(path)
    assert set(operators) <= {f"{n.domain}:{n.op_type}".lstrip(":") for n in model.graph.node}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = session.run(None, feed)
    got = qwrap.backend.prepare(model).run([feed[value.name] for value in session.get_inputs()])
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def microsoft(*op_types: str) -> list[str]:
    return [f"com.microsoft:{name}" for name in op_types]


QOPERATORS = microsoft(
    *("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearConcat"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "QGemm", "QLinearSoftmax"),
)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activation", ["QUInt8", "QInt8"])
def test_a_quantized_cnn_of_operators_gives_the_same_codes(
    tmp_path, activation, per_channel
) -> None:
    source, feed = cnn(tmp_path)
    quantization.quantize_static(
        source,
        tmp_path / "q.onnx",
        Once(feed),
        quant_format=quantization.QuantFormat.QOperator,
        activation_type=quantization.QuantType[activation],
        weight_type=quantization.QuantType.QInt8,
        per_channel=per_channel,
    )
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, QOPERATORS, tolerance=0.0)


@pytest.mark.parametrize("weight", ["QInt8", "QInt4"])
@pytest.mark.parametrize("activation", ["QUInt8", "QUInt16"])
def test_a_cnn_with_contrib_pairs_equals_onnxruntime(tmp_path, activation, weight) -> None:
    source, feed = cnn(tmp_path)
    quantization.quantize_static(
        source,
        tmp_path / "q.onnx",
        Once(feed),
        activation_type=quantization.QuantType[activation],
        weight_type=quantization.QuantType[weight],
        extra_options={"UseQDQContribOps": True},
    )
    pairs = microsoft("QuantizeLinear", "DequantizeLinear")
    # A sum in another order may cross the border between two codes, here of 1/255.
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, pairs, tolerance=1.1 / 255)


def test_a_dynamically_quantized_cnn_equals_onnxruntime(tmp_path) -> None:
    source, feed = cnn(tmp_path)
    quantization.quantize_dynamic(source, tmp_path / "q.onnx")
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, ["ConvInteger"])


@pytest.mark.parametrize(
    ("level", "quantized", "operators"),
    [
        ("ORT_ENABLE_EXTENDED", False, microsoft("FusedConv", "QuickGelu")),
        ("ORT_ENABLE_EXTENDED", True, microsoft("QGemm", "QLinearAveragePool")),
        ("ORT_ENABLE_ALL", True, microsoft("QGemm", "QLinearConv")),  # channels last
    ],
)
def test_what_a_session_saved_equals_onnxruntime(tmp_path, level, quantized, operators) -> None:
    source, feed = cnn(tmp_path)
    if quantized:
        quantization.quantize_static(source, tmp_path / "q.onnx", Once(feed))
        source = tmp_path / "q.onnx"
    optimized_by_session(source, tmp_path / "o.onnx", level)
    assert_equals_onnxruntime(tmp_path / "o.onnx", feed, operators)


def fused_bert(folder: Path, half: bool = False) -> tuple[Path, Feed]:
    source, feed = bert(folder)
    model = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=4, hidden_size=32, opt_level=0
    )
    if half:
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(folder / "fused.onnx"))
    return folder / "fused.onnx", {name: array.astype(np.int64) for name, array in feed.items()}


FUSED = ("Attention", "BiasGelu", "EmbedLayerNormalization", "SkipLayerNormalization")


def test_a_fused_transformer_equals_onnxruntime(tmp_path) -> None:
    path, feed = fused_bert(tmp_path)
    assert_equals_onnxruntime(path, feed, microsoft(*FUSED))


def test_a_fused_transformer_of_half_precision_equals_onnxruntime(tmp_path) -> None:
    path, feed = fused_bert(tmp_path, half=True)
    # Some twenty roundings to 11 bits of values up to 3.
    assert_equals_onnxruntime(path, feed, microsoft("Attention"), tolerance=0.02)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_fused_transformer_quantized_dynamically_equals_onnxruntime(
    tmp_path, per_channel
) -> None:
    source, feed = fused_bert(tmp_path)
    quantization.quantize_dynamic(
        source,
        tmp_path / "q.onnx",
        per_channel=per_channel,
        weight_type=quantization.QuantType.QUInt8 if per_channel else quantization.QuantType.QInt8,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )
    operators = microsoft("QAttention", "QEmbedLayerNormalization")
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, operators)


def test_a_quantized_transformer_of_operators_gives_the_same_codes(tmp_path) -> None:
    source, feed = bert(tmp_path)
    quantization.quantize_static(
        source,
        tmp_path / "q.onnx",
        Once(feed),
        quant_format=quantization.QuantFormat.QOperator,
    )
    operators = [*microsoft("QLinearAdd", "QLinearMul", "QLinearSoftmax"), "QLinearMatMul"]
    # The layer normalisations in between stay float.
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, operators)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "accuracy"), [(4, 0), (4, 4), (8, 4)])
def test_a_weight_only_transformer_equals_onnxruntime(tmp_path, bits, accuracy, symmetric) -> None:
    source, feed = bert(tmp_path)
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(source),
        bits=bits,
        block_size=32,
        is_symmetric=symmetric,
        accuracy_level=accuracy,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, microsoft("MatMulNBits"))


def test_a_transformer_with_4_bit_embeddings_equals_onnxruntime(tmp_path) -> None:
    source, feed = bert(tmp_path, opset=18)
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(source),
        block_size=16,
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
    operators = microsoft("MatMulNBits", "GatherBlockQuantized")
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, operators)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_transformer_with_bitsandbytes_weights_equals_onnxruntime(tmp_path, kind) -> None:
    source, feed = bert(tmp_path)
    quantizer = bnb4.MatMulBnb4Quantizer(onnx.load(source), kind, 32)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
    assert_equals_onnxruntime(tmp_path / "q.onnx", feed, microsoft("MatMulBnb4"))
