"""Every number format from a float model to a file: lowest opset, same values, honest warnings."""

from __future__ import annotations

import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import qwrap
from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import FLOATS, INTEGERS
from qwrap.errors import ConfigError, QwrapWarning

NODES = (
    "a = Conv(x, w, b) r = Relu(a) d = Conv<group=16>(r, e) c = Conv(d, v) "
    "p = GlobalAveragePool(c) f = Flatten(p) y = Gemm<transB=1>(f, g, h)"
)
WEIGHTS = {
    "w": (16, 3, 3, 3),
    "b": (16,),
    "e": (16, 1, 3, 3),
    "v": (32, 16, 1, 1),
    "g": (10, 32),
    "h": (10,),
}
NAMES = [t.name for t in (*INTEGERS, *FLOATS)]
UNFUSED = "session.disable_quant_qdq=1"
NO_KERNEL = "has no kernel for"


def net(small, opset: int = 11) -> onnx.ModelProto:
    return small.build(NODES, WEIGHTS, outputs="float[N,10] y", opset=opset)


class Made:
    """A model that went the whole way."""

    def __init__(self, source: onnx.ModelProto, config: QConfig, folder: Path, batches) -> None:
        self.model = qwrap.load(source).eval()
        self.plan = qwrap.prepare(self.model, config)
        self.batches, self.path = batches, folder / "q.onnx"
        qwrap.calibrate(self.model, batches, progress=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qwrap.export(self.model, self.path)
        self.warnings = [str(w.message) for w in caught if issubclass(w.category, QwrapWarning)]
        self.file = onnx.load(self.path)
        onnx.checker.check_model(self.file, full_check=True)

    @property
    def opset(self) -> int:
        return next(o.version for o in self.file.opset_import if not o.domain)

    def nodes(self, op_type: str) -> list[onnx.NodeProto]:
        return [n for n in self.file.graph.node if n.op_type == op_type]

    def check_reloaded(self) -> None:
        """The file, wrapped again, computes the simulation bit for bit."""
        x = torch.as_tensor(self.batches[0])
        with torch.no_grad():
            assert torch.equal(qwrap.load(self.path)(x), self.model(x))

    def verify(self) -> qwrap.verify.VerifyReport:
        return qwrap.verify(self.model, self.path, self.batches, progress=False)

    def check_runtime(self, deployed: float = 60) -> None:
        """Both levels of onnxruntime agree with their simulation but for float rounding.

        A convolution is summed in another order there, by 1e-6 relative, which moves one code in
        some ten thousand: one in 16 bits, where a step is not much more than that.
        """
        report = self.verify()
        for level, sqnr in ((report.specification, 60), (report.deployed, deployed)):
            assert level.differing <= 0.01 * level.elements
            floats = [t.dtype for t in level.tensors if t.dtype.startswith("float")]
            # Between floats near 0 there are many numbers.
            assert floats or all(t.worst_step <= 1 for t in level.tensors)
            assert all(o.sqnr > sqnr for o in level.outputs)


LOWEST = {"uint8": 13, "int8": 13, "uint2": 25, "int2": 25, "float4e2m1": 23}
LOWEST |= {t.name: 19 for t in FLOATS if t.bits == 8}


@pytest.mark.parametrize("name", NAMES)
def test_activations_and_weights_of_one_type(small, tmp_path, name: str) -> None:
    config = QConfig(activation=name, weight=name, scope="kernels", method="minmax")
    made = Made(net(small), config, tmp_path, small.batches())
    assert made.opset == LOWEST.get(name, 21)
    assert len(made.plan.constants) == 4
    made.check_reloaded()
    if name == "float4e2m1":
        assert [w for w in made.warnings if NO_KERNEL in w] == made.warnings != []
        return
    unfused = [UNFUSED in w for w in made.warnings]
    assert all(unfused)
    assert bool(unfused) == (name in ("int2", "uint2") or name.startswith("float8"))
    made.check_runtime()


BLOCKS = [
    QuantSpec(dtype="int4", block_size=8),
    QuantSpec(dtype="uint4", symmetric=False, block_size=32),
    QuantSpec(dtype="int8", block_size=5),
    QuantSpec(dtype="int2", block_size=4),
    QuantSpec(dtype="int16", block_size=16, power_of_two=True),
    QuantSpec(dtype="float8e5m2", block_size=8),
    QuantSpec(dtype="int4", block_size=8, scale_type="float16"),
    QuantSpec(dtype="int4", block_size=8, scale_type="float8e4m3fn"),
    QuantSpec(dtype="int8", block_size=8, scale_type="float8e8m0"),
    QuantSpec(dtype="float4e2m1", block_size=8, scale_type="float8e8m0"),
    QuantSpec(dtype="float4e2m1", block_size=8, scale_type="float8e4m3fn"),
]
BLOCK_OPSETS = [21, 21, 21, 25, 21, 21, 23, 21, 24, 24, 23]


@pytest.mark.parametrize("activation", [None, "uint8", "uint16"])
@pytest.mark.parametrize(
    ("weight", "opset"),
    [
        pytest.param(s, o, id=f"{s.dtype}-{s.block_size}-{s.scale_type}")
        for s, o in zip(BLOCKS, BLOCK_OPSETS, strict=True)
    ],
)
def test_weights_in_blocks(small, tmp_path, weight, opset: int, activation: str | None) -> None:
    config = QConfig(activation=activation, weight=weight, method="minmax")
    made = Made(net(small), config, tmp_path, small.batches())
    assert made.opset == opset
    blocked = {
        n.input[0].removesuffix("_quantized"): a.i
        for n in made.nodes("DequantizeLinear")
        for a in n.attribute
        if a.name == "block_size"
    }
    # Where the axis is shorter than a block there is one scale per channel.
    shapes = {"v": 16, "g": 32}
    assert blocked == {k: weight.block_size for k, s in shapes.items() if s >= weight.block_size}
    made.check_reloaded()
    if weight.scale_type == "float8e8m0" or weight.dtype.name == "float4e2m1":
        assert len(made.warnings) == 1
        assert NO_KERNEL in made.warnings[0]
    else:
        made.check_runtime()


def test_two_levels_of_scales_are_a_dequantizer_behind_a_dequantizer(small, tmp_path) -> None:
    weight = QuantSpec(dtype="int4", block_size=8, scale_type="float8e4m3fn")
    made = Made(net(small), QConfig(activation=None, weight=weight), tmp_path, small.batches())
    stored = {t.name: t for t in made.file.graph.initializer}
    assert stored["g_scale_quantized"].data_type == TensorProto.FLOAT8E4M3FN
    assert stored["g_scale_scale"].data_type == TensorProto.FLOAT
    scales = [n for n in made.nodes("DequantizeLinear") if n.input[0] == "g_scale_quantized"]
    (weights,) = [n for n in made.nodes("DequantizeLinear") if n.input[0] == "g_quantized"]
    assert [n.output[0] for n in scales] == [weights.input[1]]


def test_codes_of_few_bits_are_packed(small, tmp_path) -> None:
    sizes = {}
    for name in ("int8", "int4", "int2"):
        config = QConfig(activation=None, weight=name)
        made = Made(net(small), config, tmp_path, small.batches())
        sizes[name] = sum(
            len(t.raw_data) for t in made.file.graph.initializer if "quantized" in t.name
        )
    assert sizes["int8"] == 2 * sizes["int4"] == 4 * sizes["int2"]


# --- weights alone -------------------------------------------------------------------------------


def test_weights_alone_leave_activations_and_biases_float(small, tmp_path) -> None:
    made = Made(net(small), QConfig(activation=None), tmp_path, small.batches())
    assert made.nodes("QuantizeLinear") == []
    assert {n.input[0] for n in made.nodes("DequantizeLinear")} == {
        f"{w}_quantized" for w in ("w", "e", "v", "g")
    }
    assert not made.plan.biases
    assert "weights:   Conv 3, Gemm 1" in made.plan.summary()
    made.check_runtime()


def test_weights_alone_need_no_data(small, tmp_path) -> None:
    model = qwrap.load(net(small)).eval()
    qwrap.prepare(model, QConfig(activation=None, weight="int4"))
    with qwrap.calibrating(model):
        pass
    qwrap.export(model, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx").exists()


def test_stacks_of_matrices_have_scales_per_column_and_in_blocks(small, tmp_path) -> None:
    source = small.build("y = MatMul(x, w)", {"w": (2, 32, 6)}, "float[2,5,32] x", "float[2,5,6] y")
    batches = small.batches(shape=(2, 5, 32))
    for weight, shape in (
        ("int8", [6]),
        (QuantSpec(dtype="int4", block_size=8), [2, 4, 6]),
        (QuantSpec(dtype="int4", block_size=12), [2, 3, 6]),
    ):
        made = Made(source, QConfig(activation=None, weight=weight), tmp_path, batches)
        stored = {t.name: list(t.dims) for t in made.file.graph.initializer}
        assert stored["w_scale"] == shape
        made.check_reloaded()
        made.check_runtime()


def test_transposed_convolutions_have_blocks_along_their_inputs(small, tmp_path) -> None:
    source = small.build("y = ConvTranspose(x, w)", {"w": (16, 6, 3, 3)}, "float[N,16,5,5] x")
    batches = small.batches(shape=(2, 16, 5, 5))
    for weight, shape in (("int8", [6]), (QuantSpec(dtype="int4", block_size=8), [2, 6, 3, 3])):
        made = Made(source, QConfig(activation=None, weight=weight), tmp_path, batches)
        stored = {t.name: list(t.dims) for t in made.file.graph.initializer}
        assert stored["w_scale"] == shape
        made.check_reloaded()
        made.check_runtime()


def test_a_weight_that_codes_would_not_shrink_stays(small) -> None:
    source = small.build("y = Conv<group=3>(x, w)", {"w": (3, 1, 1, 1)}, outputs="float[N,3,8,8] y")
    plan = qwrap.prepare(qwrap.load(source), QConfig(activation=None))
    assert not plan.constants
    assert "as much space" in plan.nodes["/y"].reason


@pytest.mark.parametrize(
    ("weight", "scales"),
    [("int8", []), ("int4", [200]), (QuantSpec(dtype="uint4", block_size=32), [200, 4])],
    ids=["int8", "int4", "blocks"],
)
def test_tables_are_quantized_with_weights(small, tmp_path, weight, scales: list[int]) -> None:
    source = small.build(
        "e = Gather(t, x) y = MatMul(e, w)",
        {"t": (200, 128), "w": (128, 6)},
        "int64[N,5] x",
        "float[N,5,6] y",
    )
    batches = [np.random.default_rng(0).integers(0, 200, (2, 5))]
    made = Made(source, QConfig(activation=None, weight=weight), tmp_path, batches)
    stored = {t.name: list(t.dims) for t in made.file.graph.initializer}
    assert stored["t_scale"] == scales
    assert len(made.nodes("QuantizeLinear")) == (weight == "int8")
    made.check_reloaded()
    assert any("session.qdq_matmulnbits_accuracy_level" in note for note in made.plan.notes)
    made.check_runtime(deployed=35)  # onnxruntime rounds what it multiplies with to 8 bits


# --- com.microsoft -------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 12, 13])
@pytest.mark.parametrize("name", ["uint8", "int8", "uint16", "int16", "uint4", "int4"])
def test_contrib_quantizers_leave_the_opset_alone(small, tmp_path, name: str, opset: int) -> None:
    config = QConfig(activation=name, weight="int4", contrib=True, method="minmax")
    made = Made(net(small, opset), config, tmp_path, small.batches())
    assert made.opset == opset
    assert {n.domain for n in made.nodes("QuantizeLinear")} == {
        "" if name in ("uint8", "int8") else "com.microsoft"
    }
    made.check_reloaded()
    made.check_runtime()


def test_contrib_quantizers_fuse_as_those_of_onnx_do(small, quantized) -> None:
    config = QConfig(contrib=True, scope="kernels")
    result = quantized(small.convs(opset=11), config=config)
    assert result.operators()["QLinearConv"] == 2
    assert result.verify().deployed.differing == 0
    domains = {n.domain for n in result.file().graph.node if n.op_type == "DequantizeLinear"}
    assert domains == {"", "com.microsoft"}  # per tensor and, as opset 11 has no axis, per axis


def test_contrib_quantizers_stand_in_where_the_opset_cannot_rise(small, tmp_path) -> None:
    source = stuck(small)
    config = QConfig(activation="uint16", scope="kernels")
    made = Made(source, config, tmp_path, small.batches())
    assert made.opset == 10
    assert "opset stays 10" in made.plan.changes[0]
    assert {n.domain for n in made.nodes("QuantizeLinear")} == {"com.microsoft"}
    made.check_runtime()


def test_what_neither_opset_nor_contrib_carries_is_refused(small) -> None:
    for weight in ("float8e4m3fn", QuantSpec(dtype="int4", block_size=8)):
        with pytest.raises(ConfigError, match=r"needs opset \d+, but the model cannot be raised"):
            qwrap.prepare(qwrap.load(stuck(small)), QConfig(activation=None, weight=weight))


def stuck(small) -> onnx.ModelProto:
    """A model with a node that no later opset has the like of."""
    source = small.convs(opset=10)
    ratio = numpy_helper.from_array(np.float32([1, 1, 2, 0.4]), "scales")
    source.graph.initializer.append(ratio)
    source.graph.node[-1].output[0] = "before"
    node = onnx.helper.make_node("Resize", ["before", "scales"], ["y"], "/up", mode="nearest")
    source.graph.node.append(node)
    return source


@pytest.mark.parametrize(
    "activation",
    [QuantSpec(axis=1), QuantSpec(dtype="uint8", axis=1, block_size=4)],
    ids=["axis", "block"],
)
def test_activations_have_one_scale(small, activation: QuantSpec) -> None:
    with pytest.raises(ConfigError, match="activations are quantized per tensor"):
        qwrap.prepare(qwrap.load(net(small)), QConfig(activation=activation))


# --- float16 and bfloat16 ------------------------------------------------------------------------


def in_type(source: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    dtype = np.float16 if kind == TensorProto.FLOAT16 else ml_dtypes.bfloat16
    for tensor in source.graph.initializer:
        array = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.elem_type = kind
    return source


HALF = [
    (QConfig(method="minmax"), 19),
    (QConfig(activation=None), 19),
    (QConfig(activation=None, weight=QuantSpec(dtype="int4", block_size=8)), 21),
    (QConfig(activation="float8e4m3fn", weight="float8e5m2", method="minmax"), 19),
    (QConfig(activation="int16", contrib=True, method="minmax"), 21),
    (QConfig(activation="uint16", method="minmax"), 21),
]


@pytest.mark.parametrize(("config", "opset"), HALF, ids=lambda c: str(c)[:40])
def test_float16_graphs_have_scales_of_float16(small, tmp_path, config, opset: int) -> None:
    batches = [b.astype(np.float16) for b in small.batches()]
    made = Made(in_type(net(small), TensorProto.FLOAT16), config, tmp_path, batches)
    assert made.opset == opset
    scales = {t.data_type for t in made.file.graph.initializer if t.name.endswith("_scale")}
    assert scales == {TensorProto.FLOAT16}
    assert not made.plan.biases
    made.check_reloaded()
    # torch rounds every product of a convolution to float16, onnxruntime only the sums: by 2^-11,
    # which is 32 steps of 16 bits.
    report = made.verify()
    if not str(config.activation).startswith("float"):  # there are many floats near 0
        assert report.specification.worst_step <= (32 if "int16" in str(config.activation) else 1)
    assert all(o.sqnr > 35 for o in report.specification.outputs)
    assert all(o.sqnr > 35 for o in report.deployed.outputs)


@pytest.mark.parametrize("activation", ["uint8", "int16", "float8e4m3fn", None])
def test_bfloat16_graphs_are_written_although_nothing_runs_them(
    small, tmp_path, activation: str | None
) -> None:
    batches = [torch.from_numpy(b).bfloat16() for b in small.batches()]
    config = QConfig(activation=activation, method="minmax")
    made = Made(in_type(net(small, 22), TensorProto.BFLOAT16), config, tmp_path, batches)
    assert made.opset == (22 if activation is None else 23)
    assert len(made.warnings) == 1
    assert NO_KERNEL in made.warnings[0]
    scales = {t.data_type for t in made.file.graph.initializer if t.name.endswith("_scale")}
    assert scales == {TensorProto.BFLOAT16}
    for node in made.nodes("QuantizeLinear"):  # else its division would be one of bfloat16
        assert [a.i for a in node.attribute if a.name == "precision"] == [TensorProto.FLOAT]
    made.check_reloaded()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clamp", ["Relu(a)", "Clip(a, low, high)"])
@pytest.mark.parametrize(
    ("name", "contrib"),
    [
        ("int4", False),
        ("int4", True),
        ("uint4", False),
        ("uint4", True),
        ("int2", False),
        ("uint2", False),
        ("float8e4m3fn", False),
    ],
)
def test_onnxruntime_neither_removes_a_clamp_nor_fails_at_it(
    small, tmp_path, name: str, clamp: str, symmetric: bool, contrib: bool
) -> None:
    weights = {"w": (6, 3, 3, 3), "v": (4, 6, 1, 1), "low": np.float32(0), "high": np.float32(0.6)}
    source = small.build(f"a = Conv(x, w) r = {clamp} y = Conv(r, v)", weights)
    activation = QuantSpec(dtype=name, symmetric=symmetric)
    config = QConfig(activation=activation, weight="int4", method="minmax", contrib=contrib)
    made = Made(source, config, tmp_path, small.batches())
    made.check_reloaded()
    made.check_runtime()
    assert not made.verify().skipped
