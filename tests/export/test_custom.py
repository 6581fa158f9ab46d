"""Models with types that ONNX has no operators for: file, simulation and onnxruntime."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import qwrap
from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import QuantType, codebook_type, quant_type
from qwrap.errors import ConfigError, ExportError
from qwrap.model.points import ValuePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.functions import at_opset
from qwrap.quant.stubs import Stub

LEVELS = onnxruntime.GraphOptimizationLevel
MODES = [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL]
LOG2 = codebook_type("log2", [0, *(2.0**-k for k in range(7)), *(-(2.0**-k) for k in range(7))])
WIDE = codebook_type("wide", [k / 16 for k in range(-20, 21)])
HALVES = codebook_type("halves", [-1, -0.5, 0, 0.5, 1])  # few bits, for sums of sums
TERNARY_TEXT = """
<opset_import: ["" : 13], domain: "mine"> Ternary (x, scale) => (y) {
    one = Constant <value_float = 1.0> ()
    minus_one = Constant <value_float = -1.0> ()
    steps = Div (x, scale)
    bounded = Clip (steps, minus_one, one)
    codes = Round (bounded)
    y = Mul (codes, scale)
}"""
TERNARY = qwrap.function_type(onnx.parser.parse_function(TERNARY_TEXT), -1, 1)


def on_grid(*shape: int, seed: int) -> np.ndarray:
    """Return multiples of 2^-6, of whose products sums are exact in float32 in any order."""
    values = np.random.default_rng(seed).normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    return (np.round(values * 64) / 64).astype(np.float32)


def network(opset: int = 13, *, bias: bool = True) -> onnx.ModelProto:
    weights = {
        "w1": on_grid(8, 3, 3, 3, seed=1),
        "w2": on_grid(128, 16, seed=2) * 4,
        "w3": on_grid(16, 10, seed=3),
    }
    biases = {"b1": on_grid(8, seed=4), "b3": on_grid(10, seed=5)} if bias else {}
    tensors = {**weights, **biases}
    nodes = [
        helper.make_node("Conv", ["x", "w1", *(["b1"] if bias else [])], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w2"], ["m"]),
        helper.make_node("Relu", ["m"], ["q"]),
        helper.make_node("Gemm", ["q", "w3", *(["b3"] if bias else [])], ["y"]),
    ]
    for node in nodes:
        node.name = node.op_type + node.output[0]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7 if opset < 21 else 10
    )


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantized(
    model: onnx.ModelProto, activation: object, weight: object, **options: object
) -> WrappedModel:
    wrapped = qwrap.load(model)
    config = QConfig(
        activation=activation, weight=weight, method="minmax", weight_method="minmax", **options
    )
    qwrap.prepare(wrapped, config)
    qwrap.calibrate(wrapped, [images(seed=s) for s in range(3)], progress=False)
    return wrapped.eval()


def exported(model: WrappedModel, folder: Path) -> onnx.ModelProto:
    qwrap.export(model, folder / "quantized.onnx")
    file = onnx.load(folder / "quantized.onnx")
    onnx.checker.check_model(file, full_check=True)
    return file


def in_onnxruntime(file: onnx.ModelProto, x: Tensor) -> list[np.ndarray]:
    results = []
    for mode in MODES:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = mode
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            file.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results.append(session.run(None, {"x": x.numpy()})[0])
    return results


def assert_equal_everywhere(model: WrappedModel, folder: Path) -> onnx.ModelProto:
    """Hold onnxruntime, unoptimised and optimised, and the file read back against ``model``."""
    file, x = exported(model, folder), (images(16, seed=9) * 64).round() / 64
    with torch.no_grad():
        simulated = model(x)
        again = qwrap.load(file)(x)
    for found in in_onnxruntime(file, x):
        np.testing.assert_array_equal(found, simulated.numpy())
    assert torch.equal(again, simulated)
    return file


def exact(dtype: QuantType | str, **more: object) -> QuantSpec:
    return QuantSpec(dtype=dtype, power_of_two=True, **more)


PAIRS = {
    "int3 and int3": (exact("int3"), exact("int3")),
    "uint3 and int3": (exact("uint3", symmetric=False), exact("int3", narrow_range=True)),
    "int5 and uint6": (exact("int5"), exact("uint6")),
    "int7 and int8": (exact("int7"), exact("int8")),
    "log2 and log2": (exact(LOG2), exact(LOG2)),
    "wide and int2": (exact(WIDE), exact("int2")),
    "uint8 and log2": (exact("uint8", symmetric=False), exact(LOG2)),
    "int8 and wide": (exact("int8"), exact(WIDE)),
    "function and function": (exact(TERNARY), exact(TERNARY)),
    "uint8 and function": (exact("uint8", symmetric=False), exact(TERNARY)),
    "int3 and float": (exact("int3"), exact("float8e4m3fn")),
    "log2 and blocks": (exact(LOG2), exact(LOG2, block_size=16)),
    "int3 and blocks": (exact("int3"), exact("int3", block_size=9)),
    "function and blocks": (exact("int3"), exact(TERNARY, block_size=9)),
    "no activations": (None, exact(HALVES)),
    "no activations, function": (None, exact(TERNARY)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
def test_onnxruntime_and_the_file_read_back_compute_the_simulation_bit_for_bit(
    pair: str, per_channel: bool, tmp_path: Path
) -> None:
    model = quantized(network(), *PAIRS[pair], per_channel=per_channel)
    assert_equal_everywhere(model, tmp_path)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 23])
def test_so_they_do_at_every_opset(opset: int, tmp_path: Path) -> None:
    model = quantized(network(opset), exact(LOG2), exact(WIDE))
    file = assert_equal_everywhere(model, tmp_path)
    assert file.opset_import[0].version == max(opset, 13 if opset < 11 else 11)


def test_indices_of_four_bits_raise_the_opset_that_packs_them(tmp_path: Path) -> None:
    file = exported(quantized(network(), exact("int3"), exact(LOG2)), tmp_path)
    assert file.opset_import[0].version == 21
    kinds = {t.name: t.data_type for t in file.graph.initializer if t.name.endswith("_quantized")}
    assert kinds == dict.fromkeys(kinds, TensorProto.UINT4)
    assert len(kinds) == 3


@pytest.mark.ort(356)
def test_functions_have_readable_names_and_are_written_once(tmp_path: Path) -> None:
    file = exported(quantized(network(), exact("int3"), exact(LOG2)), tmp_path)
    assert sorted(f.name for f in file.functions) == ["DequantizeLog2", "FakeQuantizeInt3"]
    calls = [n.op_type for n in file.graph.node if n.domain == "qwrap"]
    assert calls.count("FakeQuantizeInt3") == 3  # x, r and q; p and f only move the codes of r
    assert not [n for n in file.graph.node if n.op_type == "QuantizeLinear"]
    assert [n.output[0] for n in file.graph.node][-1] == "y"


def test_types_of_one_name_get_functions_of_their_own(tmp_path: Path) -> None:
    one, other = (codebook_type("table", levels) for levels in ([-1, 0, 1], [-1, 0, 0.5]))
    file = assert_equal_everywhere(quantized(network(), exact(one), exact(other)), tmp_path)
    assert sorted(f.name for f in file.functions) == ["DequantizeTable", "FakeQuantizeTable"]
    file = assert_equal_everywhere(quantized(network(), exact(one), exact(one)), tmp_path)
    downwards = onnx.parser.parse_function(TERNARY_TEXT.replace("Round", "Floor"))
    floor = exact(qwrap.function_type(downwards, -1, 1))
    file = assert_equal_everywhere(quantized(network(), floor, exact(TERNARY)), tmp_path)
    assert sorted(f.name for f in file.functions) == ["Ternary", "Ternary_1"]


def test_a_weight_of_the_users_type_stays_float_behind_a_call(tmp_path: Path) -> None:
    file = exported(quantized(network(), None, exact(TERNARY)), tmp_path)
    stored = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    np.testing.assert_array_equal(stored["w1"], on_grid(8, 3, 3, 3, seed=1))
    assert [f.name for f in file.functions] == ["Ternary"]


def test_no_operator_of_onnxruntime_rounds_weights_or_activations_again(tmp_path: Path) -> None:
    for activation, weight in (("int3", "int3"), ("uint8", LOG2), ("int3", "int8")):
        exported(quantized(network(), activation, weight), tmp_path)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(
            tmp_path / "quantized.onnx", options, providers=["CPUExecutionProvider"]
        )
        found = {n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node}
        assert not found & {"MatMulNBits", "QLinearConv", "FusedMatMul", "QGemm", "QLinearMatMul"}


VERIFIED = ("int3 and int3", "uint8 and log2", "function and function", "log2 and blocks")


@pytest.mark.parametrize("pair", [*VERIFIED, "no activations"])
def test_verify_compares_what_functions_return(pair: str, tmp_path: Path) -> None:
    model = quantized(network(), *PAIRS[pair])
    path = tmp_path / "quantized.onnx"
    qwrap.export(model, path)
    x = [(images(seed=s) * 64).round() / 64 for s in (7, 8)]
    report = qwrap.verify(model, path, x, progress=False)
    sources = {key for key, plan in model.plan.tensors.items() if plan.source == key}
    for level in (report.specification, report.deployed):
        assert sources <= {t.name for t in level.tensors}
        assert sum(t.differing for t in (*level.tensors, *level.outputs)) == 0
    assert {s.reason for s in report.skipped} <= {"is a constant"}
    activation = PAIRS[pair][0]
    if activation is not None:
        assert {t.dtype for t in report.deployed.tensors} == {activation.dtype.name}
        isolated = qwrap.verify(model, path, x, progress=False, isolated=True)
        assert sum(t.differing for t in isolated.deployed.tensors) == 0


def test_verify_tells_what_differs_in_units_of_the_scale(tmp_path: Path) -> None:
    model = quantized(network(), exact(LOG2), exact("int8"))
    path = tmp_path / "quantized.onnx"
    qwrap.export(model, path)
    stub = model.tap(ValuePoint("x"))
    assert isinstance(stub, Stub)
    stub.initial_scale *= 2
    (found,) = (
        t
        for t in qwrap.verify(model, path, [images()], progress=False).specification.tensors
        if t.name == "x"
    )
    with torch.no_grad():
        doubled = stub(images())
        stub.initial_scale /= 2
        steps = ((doubled - stub(images())) / stub.scale).abs()
    assert found.worst_step == steps.max()
    assert found.differing == steps.count_nonzero()


@pytest.mark.parametrize("weight", ["int5", "int6", "int7", "uint7"])
@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_weights_that_eight_bits_carry_run_in_integer_kernels(
    activation: str, weight: str, tmp_path: Path
) -> None:
    model = quantized(network(), activation, weight, scope="kernels")
    assert len(model.plan.biases) == 2
    path = tmp_path / "quantized.onnx"
    qwrap.export(model, path)
    report = qwrap.verify(model, path, [images(seed=5)], progress=False)
    assert report.specification.tensors
    assert not any(t.differing for t in report.deployed.tensors)
    assert not any(t.differing for t in report.deployed.outputs)


def test_biases_beside_weights_that_four_bits_carry_are_codes(tmp_path: Path) -> None:
    """Else onnxruntime rounds them to the accumulator's codes by itself, which nobody simulates."""
    model = quantized(network(), "uint8", "int3", scope="kernels")
    assert len(model.plan.biases) == 2
    path = tmp_path / "quantized.onnx"
    qwrap.export(model, path)
    report = qwrap.verify(model, path, [images(seed=5)], progress=False)
    assert not any(t.differing for t in report.deployed.tensors)


def test_biases_stay_float() -> None:
    for activation, weight in (("int3", "int8"), ("uint8", LOG2), (TERNARY, TERNARY)):
        plan = quantized(network(), activation, weight).plan
        assert not plan.biases
        assert len(plan.constants) == 3


def test_a_quantized_graph_output_keeps_its_name(tmp_path: Path) -> None:
    model = network()
    model.graph.output[0].name = "r"
    del model.graph.node[2:], model.graph.initializer[1:3]
    model.graph.output[0].type.tensor_type.shape.ClearField("dim")
    for size in ("n", 8, 8, 8):
        dim = model.graph.output[0].type.tensor_type.shape.dim.add()
        dim.dim_param, dim.dim_value = (size, 0) if isinstance(size, str) else ("", size)
    file = assert_equal_everywhere(quantized(model, exact("int3"), exact("int3")), tmp_path)
    assert file.graph.output[0].name == "r"
    assert file.graph.node[-1].op_type == "FakeQuantizeInt3"


def branching() -> onnx.ModelProto:
    """Return a model with a constant operand, and branches that read a quantized value."""
    text = """
    <ir_version: 8, opset_import: ["" : 13]>
    branching (float[n, 3, 8, 8] x, bool which) => (float[n, 4, 8, 8] y)
    <float[4, 3, 1, 1] w, float[1, 3, 1, 1] shift, float[4, 4, 1, 1] v> {
        moved = Add (x, shift)
        a = Conv (moved, w)
        y = If (which) <
            then_branch = positive () => (float[n, 4, 8, 8] p) { p = Conv (a, v) },
            else_branch = other () => (float[n, 4, 8, 8] q) { r = Relu (a) q = Conv (r, v) }
        >
    }"""
    model = onnx.parser.parse_model(text)
    arrays = {
        "w": on_grid(4, 3, 1, 1, seed=1),
        "shift": on_grid(1, 3, 1, 1, seed=2),
        "v": on_grid(4, 4, 1, 1, seed=3),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for i, node in enumerate(model.graph.node):
        node.name = f"node{i}"
    return model


@pytest.mark.parametrize(
    ("activation", "weight"), [("int3", "int3"), (LOG2, WIDE), (TERNARY, TERNARY)], ids=str
)
def test_branches_and_constant_operands_read_what_functions_return(
    activation: QuantType | str, weight: QuantType | str, tmp_path: Path
) -> None:
    model = qwrap.load(branching())
    config = QConfig(
        activation=exact(activation), weight=exact(weight), method="minmax", scope="kernels"
    )
    plan = qwrap.prepare(model, config)
    choices = torch.tensor(True), torch.tensor(False)
    qwrap.calibrate(model, [(images(), which) for which in choices], progress=False)
    assert "moved" in plan.tensors
    assert len(plan.constants) >= 3
    file = exported(model, tmp_path)
    x = (images(seed=3) * 64).round() / 64
    for which in choices:
        with torch.no_grad():
            simulated = model(x, which)
            assert torch.equal(qwrap.load(file)(x, which), simulated)
        for mode in MODES:
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = mode
            session = onnxruntime.InferenceSession(
                file.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            feed = {"x": x.numpy(), "which": which.numpy()}
            np.testing.assert_array_equal(session.run(None, feed)[0], simulated.numpy())


def test_half_precision_models_have_casts_inside_the_functions(tmp_path: Path) -> None:
    model = network()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for weight in (LOG2, TERNARY, quant_type("int3")):
        wrapped = qwrap.load(model)
        config = QConfig(activation="int3", weight=weight, method="minmax", weight_method="minmax")
        qwrap.prepare(wrapped, config)
        qwrap.calibrate(wrapped, [images().half()], progress=False)
        file = exported(wrapped, tmp_path)
        assert "FakeQuantizeInt3OfFloat16" in [f.name for f in file.functions]
        with torch.no_grad():
            simulated = wrapped(images().half()).float()
            again = qwrap.load(file)(images().half()).float()
        assert torch.equal(again, simulated)
        for found in in_onnxruntime(file, images().half()):
            # Sums are rounded to float16 in another order; what ties differently may move a code.
            close = np.isclose(found.astype(np.float32), simulated.numpy(), atol=0.02, rtol=0.01)
            assert close.mean() > 0.9


def test_a_function_that_has_no_equal_at_the_opset_of_the_model_is_refused_by_prepare() -> None:
    text = """
    <opset_import: ["" : 5], domain: "mine"> Tiled (x, scale) => (y) {
        one = Constant <value = float[1] {1.0}> ()
        y = Tile (x, one, one)
    }"""
    function = onnx.parser.parse_function(text).SerializeToString()
    assert TERNARY.function is not None
    dtype = replace(TERNARY, function=replace(TERNARY.function, proto=function))
    with pytest.raises(ConfigError, match=r"Ternary.*Tile"):
        qwrap.prepare(qwrap.load(network(21)), QConfig(weight=dtype))


def test_a_function_is_written_at_the_opset_of_the_model() -> None:
    proto = onnx.parser.parse_function(TERNARY_TEXT)
    with pytest.raises(ExportError, match="written for opset 13, but the graph imports opset 11"):
        at_opset(proto, 11)
    for opset in (13, 21):
        assert at_opset(proto, opset).opset_imports[""] == opset


def test_a_function_raises_the_opset_of_the_model(tmp_path: Path) -> None:
    text = TERNARY_TEXT.replace('"" : 13', '"" : 19')
    later = qwrap.function_type(onnx.parser.parse_function(text), -1, 1)
    file = assert_equal_everywhere(quantized(network(), exact(later), exact("int8")), tmp_path)
    assert file.opset_import[0].version == 19


@pytest.mark.parametrize(
    ("activation", "weight"), [("int3", "int3"), (LOG2, LOG2), ("uint3", TERNARY)], ids=str
)
def test_training_lowers_the_loss_and_the_file_computes_what_was_trained(
    activation: QuantType | str, weight: QuantType | str, tmp_path: Path
) -> None:
    model = quantized(network(bias=False), exact(activation), exact(weight)).train()
    x, labels = images(64), torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert_equal_everywhere(model.eval(), tmp_path)


def test_gradients_of_a_file_read_back_stop_at_its_roundings(tmp_path: Path) -> None:
    again = qwrap.load(exported(quantized(network(), "int3", TERNARY), tmp_path))
    again(images()).sum().backward()
    gradients = {n: p.grad for n, p in again.named_parameters()}
    assert not gradients["w1"].any()  # Round has gradient 0, and straight-through is no operator
    assert gradients["b3"].any()


METHODS = ("minmax", "ema", "percentile", "mse", "l1", "cosine", "entropy", "distribution")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["int3", LOG2, WIDE, TERNARY], ids=str)
def test_every_method_chooses_a_range_for_such_types(dtype: QuantType | str, method: str) -> None:
    model = qwrap.load(network())
    qwrap.prepare(model, QConfig(activation=dtype, weight="int8", method=method))
    qwrap.calibrate(model, [images(16)], progress=False)
    stub = model.tap(ValuePoint("x"))
    assert isinstance(stub, Stub)
    reach = float(stub.scale) * stub.spec.qmax / float(images(16).abs().max())
    assert 0.1 < reach < 2  # "distribution" may go beyond what was seen
