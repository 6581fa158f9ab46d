"""Files for each target obey what is known of it, and onnxruntime on CPUs runs them too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import qwrap
from qwrap.config import QConfig, QuantSpec
from qwrap.errors import ConfigError
from qwrap.targets import OPENVINO, ORT_CPU, QNN, TARGETS, TENSORRT, VITISAI

OTHERS = [QNN, TENSORRT, OPENVINO, VITISAI]
MIDDLE = {"uint8": 128, "int8": 0, "uint16": 32768, "int16": 0, "int4": 0}
WEIGHT_INDEX = 1


@dataclass
class Pair:
    """A DequantizeLinear of a file: what it reads, with which scales, and who reads it."""

    dtype: str
    scale: np.ndarray
    zero_point: np.ndarray
    block_size: int | None
    stored: bool
    readers: list[tuple[str, int]]


def pairs(model: onnx.ModelProto) -> Iterator[Pair]:
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    kinds = {
        i.name: TensorProto.DataType.Name(i.data_type).lower() for i in model.graph.initializer
    }
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        blocks = [a.i for a in node.attribute if a.name == "block_size"]
        readers = [
            (user.op_type, index)
            for user in model.graph.node
            for index, name in enumerate(user.input)
            if name == node.output[0]
        ]
        yield Pair(
            dtype=kinds[node.input[2]],
            scale=stored[node.input[1]],
            zero_point=stored[node.input[2]],
            block_size=blocks[0] if blocks else None,
            stored=node.input[0] in stored,
            readers=readers,
        )


def cnn(small) -> onnx.ModelProto:
    """Convolutions, one depthwise, a residual, pools, a clip, a sigmoid and a classifier."""
    nodes = (
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1) b = Relu(a)"
        " c = Conv<pads=[1,1,1,1], group=6>(b, w2, b2) d = Clip(c, zero, six)"
        " e = Conv(d, w3, b3) f = Add(e, b) g = Relu(f) h = MaxPool<kernel_shape=[2,2]>(g)"
        " k = Conv(h, w4) s = Sigmoid(k) m = Mul(k, s) p = GlobalAveragePool(m)"
        " q = Flatten(p) y = Gemm(q, w5, b5)"
    )
    weights = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 1, 3, 3), "b2": (6,), "b3": (6,)}
    weights |= {"w3": (6, 6, 1, 1), "w4": (8, 6, 1, 1), "w5": (8, 5), "b5": (5,)}
    limits = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return small.build(nodes, {**weights, **limits}, outputs="float[N,M] y")


def transformer(small) -> onnx.ModelProto:
    nodes = (
        "n = LayerNormalization(x, g, o) q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)"
        " kt = Transpose<perm=[0,2,1]>(k) qk = MatMul(q, kt) sc = Mul(qk, quarter)"
        " p = Softmax<axis=-1>(sc) av = MatMul(p, v) w = MatMul(av, wo) r = Add(w, x)"
        " h = MatMul(r, w1) hb = Add(h, b1) u = Relu(hb) z = MatMul(u, w2) y = Add(z, r)"
    )
    square = dict.fromkeys(("wq", "wk", "wv", "wo"), (16, 16))
    more = {"g": (16,), "o": (16,), "w1": (16, 32), "b1": (32,), "w2": (32, 16)}
    number = {"quarter": np.array(0.25, np.float32)}
    return small.build(
        nodes,
        {**square, **more, **number},
        inputs="float[2,8,16] x",
        outputs="float[2,8,16] y",
        opset=17,
    )


NETWORKS = {"cnn": (cnn, (2, 3, 8, 8)), "transformer": (transformer, (2, 8, 16))}


def check_obeys(model: onnx.ModelProto, target: qwrap.Target) -> None:
    """What a file's pairs are, read off it, against the words of the target's documentation."""
    kernels = target.kernels
    assert kernels is not None
    for pair in pairs(model):
        where = f"{pair}"
        if target.power_of_two:
            assert (np.frexp(pair.scale)[0] == 0.5).all(), where
        if pair.dtype == "int32":
            assert target.bias == "int32", where
            assert all(index == 2 for _, index in pair.readers), where
            continue
        for op_type, index in pair.readers:
            is_weight = pair.stored and op_type in target.matrix and index == WEIGHT_INDEX
            is_bias = pair.stored and op_type in target.matrix and index > WEIGHT_INDEX
            if is_bias:
                assert pair.dtype == target.bias, where
            elif is_weight:
                named = [k for k in kernels if k.operators and op_type in k.operators]
                assert any(pair.dtype in k.weights for k in named), where
                if pair.dtype in target.symmetric_weights:
                    assert (pair.zero_point == MIDDLE[pair.dtype]).all(), where
                if not target.has_channels(op_type):
                    assert pair.scale.size == 1, where
            else:
                assert pair.scale.size == 1, where
                assert any(pair.dtype in k.activations for k in kernels), where
                if pair.dtype in target.symmetric:
                    assert pair.zero_point == MIDDLE[pair.dtype], where


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", OTHERS, ids=lambda target: target.name)
def test_a_file_for_a_target_obeys_it_and_runs_here_too(small, quantized, target, network) -> None:
    build, shape = NETWORKS[network]
    batches = small.batches(shape=shape)
    result = quantized(build(small), batches, QConfig.for_target(target.name))
    check_obeys(result.file(), target)
    (runtime,) = small.run(result.path, batches[0])
    with torch.no_grad():
        literal = result.model(torch.from_numpy(batches[0])).numpy()
    noise = np.square(runtime - literal).sum()
    # onnxruntime may fuse what this target does not, or round a float bias: a step here and there
    assert noise <= 1e-3 * np.square(runtime).sum()


@pytest.mark.parametrize("target", OTHERS, ids=lambda target: target.name)
def test_layers_are_quantized_whatever_it_costs_on_cpus(small, target) -> None:
    model = qwrap.load(cnn(small))
    plan = qwrap.prepare(model, QConfig.for_target(target.name))
    layers = [n for n in plan.nodes.values() if n.op_type in ("Conv", "Gemm")]
    assert [n.role for n in layers] == ["integer"] * 5
    assert plan.fused
    assert not any("onnxruntime" in note for note in plan.notes)


def test_tensorrt_has_pairs_on_inputs_of_layers_not_behind_them(small, quantized) -> None:
    """A residual reads the pair in front of the branch, and activations fuse into their layers."""
    result = quantized(cnn(small), config=QConfig.for_target("tensorrt"))
    file = result.file()
    quantizes = [n.input[0] for n in file.graph.node if n.op_type == "QuantizeLinear"]
    assert "a" not in quantizes  # between Conv and Relu
    assert "e" not in quantizes  # between Conv and residual Add
    readers = {n.name: list(n.input) for n in file.graph.node}
    assert readers["/f"] == ["e", "b_DequantizeLinear_Output"]
    biases = [n.input[2] for n in file.graph.node if n.op_type in ("Conv", "Gemm") and n.input[2:]]
    assert biases == ["b1", "b2", "b3", "b5"]  # as they were


def test_qnn_dictates_what_sigmoid_puts_out_in_16_bits(small, quantized) -> None:
    config = QConfig.for_target("qnn", activation="uint16")
    config.contrib = True
    result = quantized(cnn(small), config=config)
    stored = {i.name: numpy_helper.to_array(i) for i in result.file().graph.initializer}
    assert stored["s_scale"] == np.float32(1 / 65536)
    assert stored["s_zero_point"] == 0
    weights = {str(result.model.plan.constants[key, 1].spec.dtype) for key in ("/a", "/c", "/y")}
    assert weights == {"int8"}


def test_qnn_mixes_16_and_8_bits(small, quantized) -> None:
    config = QConfig.for_target("qnn", contrib=True)
    config.set(["/k", "/s", "/m"], activation="uint16")
    result = quantized(cnn(small), config=config)
    check_obeys(result.file(), QNN)
    assert {p.dtype for p in pairs(result.file())} >= {"uint8", "uint16"}


REFUSED = [
    (
        "tensorrt",
        {"activation": "uint8"},
        r"'/a' \(Conv\): activations of uint8.*'tensorrt' runs.*int8",
    ),
    ("tensorrt", {"activation": "int16", "contrib": True}, "activations of int16"),
    ("tensorrt", {"weight": "int4"}, r"Conv.*weights of int4.*'tensorrt' runs Conv"),
    ("tensorrt", {"activation": QuantSpec(dtype="int8", symmetric=False)}, "'x': int8 with a zero"),
    ("qnn", {"weight": "int4"}, r"activations of uint8, weights of int4"),
    ("qnn", {"activation": "uint4"}, "activations of uint4"),
    ("openvino", {"activation": "uint16", "contrib": True}, "activations of uint16"),
    ("openvino", {"weight": "int16"}, "weights of int16"),
    ("vitisai", {"activation": "uint8"}, "activations of uint8"),
    (
        "vitisai",
        {"activation": QuantSpec(dtype="int8")},
        "'x': any scale; target 'vitisai' has powers",
    ),
]


@pytest.mark.parametrize(("target", "settings", "message"), REFUSED)
def test_what_a_target_cannot_carry_is_refused(small, target, settings, message) -> None:
    model = qwrap.load(cnn(small))
    with pytest.raises(ConfigError, match=message):
        qwrap.prepare(model, QConfig.for_target(target, **settings))


def test_a_region_with_a_type_that_a_target_lacks_is_refused(small) -> None:
    config = QConfig.for_target("openvino", contrib=True)
    config.set("/e", activation="uint16")
    with pytest.raises(ConfigError, match=r"node '/e' \(Conv\): activations of uint16"):
        qwrap.prepare(qwrap.load(cnn(small)), config)


def test_channels_are_given_up_where_a_target_has_one_scale(small) -> None:
    plan = qwrap.prepare(qwrap.load(cnn(small)), QConfig.for_target("qnn"))
    assert plan.constants["/a", 1].spec.axis == 0
    assert plan.constants["/y", 1].spec.axis is None


@pytest.mark.parametrize("target", OTHERS, ids=lambda target: target.name)
def test_products_of_two_activations_are_quantized(small, target) -> None:
    model = qwrap.load(transformer(small))
    plan = qwrap.prepare(model, QConfig.for_target(target.name))
    assert [plan.nodes[key].role for key in ("/qk", "/av", "/q")] == ["integer"] * 3


@pytest.mark.parametrize("target", [OPENVINO, VITISAI], ids=lambda target: target.name)
def test_joined_tensors_have_one_scale_where_a_target_wants_that(small, quantized, target) -> None:
    nodes = (
        "a = Conv(x, w1) b = Conv(x, w2) h = Mul(b, hundred) c = Concat<axis=1>(a, h)"
        " y = Conv(c, w3)"
    )
    weights = {"w1": (4, 3, 1, 1), "w2": (4, 3, 1, 1), "w3": (4, 8, 1, 1)}
    source = small.build(nodes, {**weights, "hundred": np.array([[[100]]], np.float32)})
    result = quantized(source, config=QConfig.for_target(target.name))
    stored = {i.name: numpy_helper.to_array(i) for i in result.file().graph.initializer}
    assert stored["a_scale"] == stored["h_scale"] == stored["c_scale"]
    free = quantized(source, config=QConfig(scope="all"))
    stored = {i.name: numpy_helper.to_array(i) for i in free.file().graph.initializer}
    assert stored["a_scale"] < 0.1 * stored["h_scale"]


def test_pools_keep_the_scale_of_what_they_read_for_vitis_ai(small, quantized) -> None:
    result = quantized(cnn(small), config=QConfig.for_target("vitisai"))
    stored = {i.name: numpy_helper.to_array(i) for i in result.file().graph.initializer}
    assert stored["m_scale"] == stored["p_scale"]


def test_an_unknown_target_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"target='tensort'.*nearest is 'tensorrt'"):
        QConfig(target="tensort")


def test_a_target_of_the_users_own(small) -> None:
    from dataclasses import replace

    own = replace(QNN, name="mine", per_channel=frozenset())
    plan = qwrap.prepare(qwrap.load(cnn(small)), QConfig.for_target(own))
    assert plan.constants["/a", 1].spec.axis is None


@pytest.mark.ort(355)
def test_what_runs_and_what_is_fast() -> None:
    assert ORT_CPU.supports("Conv", "uint16", "int4")
    assert ORT_CPU.fast("Conv", "uint8", "int8")
    assert not ORT_CPU.fast("Conv", "uint8", "uint8")
    assert not ORT_CPU.fast("Conv", "int8", "int8")
    assert not ORT_CPU.fast("Conv", "uint16", "int8")
    assert not ORT_CPU.fast("Erf", "uint8")
    assert not ORT_CPU.fast("Conv", "float32", "int8")
    assert QNN.supports("Conv", "uint16", "int4")
    assert not QNN.supports("Conv", "uint8", "int4")
    assert QNN.fast("MatMul", "uint16", "int8")
    assert not TENSORRT.supports("Conv", "uint8", "int8")
    assert TENSORRT.supports("MatMul", "float32", "int4")
    assert OPENVINO.supports("Add", "int8")
    assert not VITISAI.supports("Conv", "int16", "int8")
    for target in TARGETS.values():
        assert target.supports("Conv", "float32")
        for kernel in target.kernels or ():
            for op_type in kernel.operators or ():
                for weight in kernel.weights:
                    for activation in kernel.activations:
                        assert target.supports(op_type, activation, weight)


@pytest.mark.parametrize("target", TARGETS)
def test_the_types_of_every_target_are_types_of_qwrap(target: str) -> None:
    from qwrap.dtypes import quant_type

    found = TARGETS[target]
    names = {name for k in found.kernels or () for name in (*k.activations, *k.weights)}
    names |= found.symmetric | found.symmetric_weights | (found.blocks or set())
    for name in names - {"float32"}:
        assert str(quant_type(name)) == name
