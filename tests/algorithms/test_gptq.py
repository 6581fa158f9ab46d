"""GPTQ against closed forms, nearest rounding, and onnxruntime's output."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

import qwrap
from qwrap.algorithms.gptq import round_weights
from qwrap.config import QuantSpec
from qwrap.errors import ConfigError, InputError, NotCalibratedError
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.prepare import bias_stubs, plan_of, stubs

FLOAT = onnx.TensorProto.FLOAT
SIDE = {"pads": [1, 1, 1, 1]}
# Operator, weight shape, input shape, attributes, whether it has a bias.
LAYERS = {
    "Conv": ("Conv", (8, 6, 3, 3), (2, 6, 9, 9), {}, True),
    "Conv without bias": ("Conv", (8, 6, 3, 3), (2, 6, 9, 9), {}, False),
    "strided": ("Conv", (8, 6, 3, 3), (2, 6, 13, 13), {"strides": [2, 2], **SIDE}, True),
    "dilated": ("Conv", (8, 6, 3, 3), (2, 6, 13, 13), {"dilations": [2, 2]}, True),
    "groups": ("Conv", (8, 3, 3, 3), (2, 6, 9, 9), {"group": 2, "pads": [0, 1, 2, 1]}, True),
    "depthwise": ("Conv", (6, 1, 3, 3), (2, 6, 9, 9), {"group": 6, **SIDE}, True),
    "wide": ("Conv", (8, 20, 3, 3), (2, 20, 13, 13), {}, True),  # two blocks of inputs
    "Gemm": ("Gemm", (24, 16), (48, 24), {}, True),
    "Gemm transB": ("Gemm", (16, 24), (48, 24), {"transB": 1}, True),
    "Gemm transA": ("Gemm", (24, 16), (24, 48), {"transA": 1}, False),
    "MatMul": ("MatMul", (24, 16), (2, 24, 24), {}, False),
    "batched": ("MatMul", (2, 24, 16), (4, 2, 24, 24), {}, False),
    "transpose": ("ConvTranspose", (6, 8, 3, 3), (2, 6, 9, 9), {"strides": [2, 2]}, True),
    "depthwise transpose": ("ConvTranspose", (6, 1, 3), (4, 6, 20), {"group": 6}, True),
}


def build(name: str, seed: int = 0) -> onnx.ModelProto:
    op_type, weight_shape, input_shape, attributes, has_bias = LAYERS[name]
    rng = np.random.default_rng(seed)
    stored = {"w": rng.standard_normal(weight_shape).astype(np.float32)}
    if has_bias:
        stored["b"] = rng.standard_normal(8 if name == "wide" else 16).astype(np.float32)
        first = op_type == "Conv" or "transB" in attributes
        count = weight_shape[0 if first else 1] * (1 if first else attributes.get("group", 1))
        stored["b"] = stored["b"][:count]
    return model_of(op_type, stored, len(input_shape), attributes)


def model_of(
    op_type: str, stored: dict[str, np.ndarray], rank: int, attributes: dict[str, object]
) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x", *stored], ["y"], "node", **attributes)
    graph = helper.make_graph(
        [node],
        "single",
        [helper.make_tensor_value_info("x", FLOAT, [None] * rank)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(value, key) for key, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def correlated(shape: tuple[int, ...], count: int, sign: float = 1.0) -> list[torch.Tensor]:
    """Return batches that share one random number per sample, with a mean far from 0."""
    rng = np.random.default_rng(1)
    direction = np.where(rng.random(shape[1:]) < 0.5, 1, sign)
    batches = []
    for _ in range(count):
        common = rng.standard_normal((shape[0], *[1] * (len(shape) - 1))) * direction
        batches.append(common + 0.3 * rng.standard_normal(shape) + 1)
    return [torch.from_numpy(b.astype(np.float32)) for b in batches]


def calibrated(
    model: onnx.ModelProto, batches: list[torch.Tensor], **config: object
) -> WrappedModel:
    # 16-bit activations: what they add to the error of the weights is small.
    wrapped = qwrap.load(model).eval()
    settings = {"method": "minmax", "activation": "uint16", "scope": "kernels", **config}
    qwrap.prepare(wrapped, qwrap.QConfig(**settings))
    qwrap.calibrate(wrapped, batches, progress=False)
    return wrapped


def output_error(model: onnx.ModelProto, wrapped: WrappedModel, x: torch.Tensor) -> float:
    """Return the relative squared error that onnxruntime sees from the stubs' constants."""
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    for target in quantized.graph.initializer:  # a bias may stay float
        stored = wrapped.stored(target.name).detach().numpy()
        target.CopyFrom(onnx.numpy_helper.from_array(stored, target.name))
    points = [p for p, _ in (*stubs(wrapped), *bias_stubs(wrapped)) if isinstance(p, UsePoint)]
    plan = plan_of(wrapped)
    for point in points:
        where = (point.node, point.index)
        constant = plan.constants.get(where) or plan.biases[where]
        value = wrapped.stored(constant.value)
        rounded = wrapped.tap(point)(value).detach().numpy()
        (target,) = [t for t in quantized.graph.initializer if t.name == constant.value]
        target.CopyFrom(onnx.numpy_helper.from_array(rounded, target.name))
    outputs = [
        ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": x.numpy()}
        )[0]
        for m in (model, quantized)
    ]
    return float(np.square(outputs[1] - outputs[0]).sum() / np.square(outputs[0]).sum())


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_come_closer_than_with_nearest_rounding(name: str) -> None:
    _, _, shape, attributes, _ = LAYERS[name]
    model, transposed = build(name), "transA" in attributes
    batches = correlated(shape[::-1] if transposed else shape, 24)
    batches, unseen = batches[:16], torch.cat(batches[16:])
    if transposed:
        *batches, unseen = (b.t().contiguous() for b in (*batches, unseen))
    only = {"activation": None} if "transpose" in name else {}  # has no kernel of 16 bits
    wrapped = calibrated(model, batches, **only)
    nearest = output_error(model, wrapped, unseen)
    assert round_weights(wrapped, batches)
    # The common part of the input makes up most of its power, and its error can be taken away.
    assert output_error(model, wrapped, unseen) < 0.5 * nearest


@pytest.mark.parametrize("activation", ["uint16", None])
@pytest.mark.parametrize(
    "weight",
    [
        QuantSpec(dtype="int4", block_size=4),
        QuantSpec(dtype="uint4", symmetric=False, block_size=8),
        QuantSpec(dtype="int2", block_size=3),
        QuantSpec(dtype="float4e2m1", block_size=4, scale_type="float8e8m0"),
    ],
    ids=lambda spec: f"{spec.dtype}-{spec.block_size}",
)
@pytest.mark.parametrize("name", ["Conv", "groups", "Gemm", "Gemm transB", "MatMul"])
def test_weights_in_blocks_come_closer_too_and_stay_on_their_grids(
    name: str, weight: QuantSpec, activation: str | None
) -> None:
    model = build(name)
    batches = correlated(LAYERS[name][2], 24)
    batches, unseen = batches[:16], torch.cat(batches[16:])
    wrapped = calibrated(model, batches, weight=weight, activation=activation)
    before = output_error(model, wrapped, unseen)
    assert round_weights(wrapped, batches)
    assert output_error(model, wrapped, unseen) < 0.7 * before
    rounded, stub = wrapped.stored("w").detach(), wrapped.tap(UsePoint("node", 1))
    assert torch.equal(stub(rounded), rounded)


@pytest.mark.parametrize("weight_type", ["int8", "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ["Conv", "groups", "Gemm", "Gemm transB", "MatMul"])
def test_rounded_weights_quantize_to_themselves(
    name: str, per_channel: bool, weight_type: str
) -> None:
    batches = correlated(LAYERS[name][2], 4)
    wrapped = calibrated(build(name), batches, per_channel=per_channel, weight=weight_type)
    before = wrapped.stored("w").clone()
    assert round_weights(wrapped, batches)
    weight, stub = wrapped.stored("w").detach(), wrapped.tap(UsePoint("node", 1))
    assert torch.equal(stub(weight), weight)
    assert not torch.equal(stub(before), weight)


def test_when_other_batches_get_worse_every_bit_is_put_back() -> None:
    # On white noise nothing is nearer than the nearest weights.
    noise = torch.randn(4, 48, 24, generator=torch.Generator().manual_seed(0))
    batches = [b for pair in zip(correlated((48, 24), 4), noise, strict=True) for b in pair]
    wrapped = calibrated(build("Gemm"), batches)
    before = {key: value.clone() for key, value in wrapped.named_parameters()}
    assert not round_weights(wrapped, batches)
    assert before.keys() >= {"w", "b"}
    for key, value in wrapped.named_parameters():
        assert torch.equal(value, before[key]), key


def test_the_same_batches_give_the_same_bits() -> None:
    batches = correlated(LAYERS["groups"][2], 4)
    found = []
    for _ in range(2):
        wrapped = calibrated(build("groups"), batches)
        assert round_weights(wrapped, batches)
        found.append((wrapped.stored("w").clone(), wrapped.stored("b").clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_weight_that_two_layers_use_is_rounded_for_the_inputs_of_both() -> None:
    model = build("MatMul")
    model.graph.node.append(helper.make_node("Neg", ["x"], ["n"], "neg"))
    model.graph.node.append(helper.make_node("MatMul", ["n", "w"], ["z"], "other"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    model = onnx.shape_inference.infer_shapes(model)
    batches = correlated((2, 24, 24), 8)
    both, alone = calibrated(model, batches), calibrated(build("MatMul"), batches)
    assert round_weights(both, batches, damping=0.01)  # by default it goes by the number of rows
    assert round_weights(alone, batches, damping=0.01)
    # Products of two inputs are the same with both signs.
    assert torch.equal(both.stored("w"), alone.stored("w"))


def test_a_weight_that_is_read_otherwise_too_is_left_alone() -> None:
    model = build("MatMul")
    model.graph.node.append(helper.make_node("Neg", ["w"], ["z"], "other"))
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, None))
    model = onnx.shape_inference.infer_shapes(model)
    batches = correlated((2, 24, 24), 4)
    wrapped = calibrated(model, batches)
    before = wrapped.stored("w").clone()
    outcome = round_weights(wrapped, batches)
    assert not outcome
    assert outcome.details[1:] == ("'w' is read in another way, too",)
    assert torch.equal(wrapped.stored("w"), before)


def chain() -> onnx.ModelProto:
    """Two layers; the errors of the first one reach the second."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "v", "c"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w", "b"], ["y"], "second"),
    ]
    stored = {"v": (24, 16), "c": (16,), "w": (16, 8), "b": (8,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in stored.items()}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", FLOAT, [None, 24])],
        [helper.make_tensor_value_info("y", FLOAT, [None, 8])],
        [onnx.numpy_helper.from_array(value, key) for key, value in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def test_in_turn_the_second_layer_makes_good_what_the_first_one_lost() -> None:
    # The first layer keeps 2 bits, so that nearly all error is its own; the second has 8.
    found = {}
    for sequential in (False, True):
        wrapped = qwrap.load(chain()).eval()
        config = qwrap.QConfig(activation=None, weight="int8", scope="kernels")
        config.set("first", weight="int2")
        qwrap.prepare(wrapped, config)
        batches = correlated((256, 24), 8)
        qwrap.calibrate(wrapped, batches, progress=False)
        outcome = round_weights(wrapped, batches, sequential=sequential, progress=False)
        assert outcome
        found[sequential] = outcome.after
        for node, name in (("first", "v"), ("second", "w")):
            weight = wrapped.stored(name).detach()
            assert torch.equal(wrapped.tap(UsePoint(node, 1))(weight), weight)
    assert found[True] < 0.8 * found[False]


def test_in_turn_a_bias_that_was_moved_does_not_count() -> None:
    found = []
    for shift in (0.0, 3.0):
        batches = correlated((64, 24), 4)
        wrapped = calibrated(chain(), batches, activation=None, weight="int4")
        with torch.no_grad():
            wrapped.stored("b").add_(shift)
        assert round_weights(wrapped, batches, sequential=True, progress=False)
        found.append(wrapped.stored("b").clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["groups", "transpose", "batched", "MatMul"])
def test_in_turn_outputs_come_closer_for_every_kind_of_layer(name: str) -> None:
    model, batches = build(name), correlated(LAYERS[name][2], 24)
    batches, unseen = batches[:16], torch.cat(batches[16:])
    wrapped = calibrated(model, batches, activation=None)
    nearest = output_error(model, wrapped, unseen)
    assert round_weights(wrapped, batches, sequential=True, progress=False)
    assert output_error(model, wrapped, unseen) < 0.5 * nearest


def test_in_turn_a_real_network_loses_most_of_its_error_at_4_bits(shared_model) -> None:
    wrapped, samples = shared_model("resnet20_cifar10", 16, weight="int4")
    halves = [samples[::2], samples[1::2]]
    batches = [{key: np.concatenate([x[key] for x in half]) for key in half[0]} for half in halves]
    outcome = round_weights(wrapped, batches, sequential=True, progress=False)
    assert outcome
    assert outcome.after < 0.3 * outcome.before


def test_it_refuses_what_it_cannot_work_with() -> None:
    batches = correlated((48, 24), 2)
    wrapped = calibrated(build("Gemm"), batches)
    with pytest.raises(InputError, match="no batches"):
        round_weights(wrapped, [])
    with pytest.raises(ConfigError, match="damping=0: expected more than 0"):
        round_weights(wrapped, batches, damping=0)
    bare = qwrap.load(build("Gemm")).eval()
    with pytest.raises(ConfigError, match="not prepared"):
        round_weights(bare, batches)
    qwrap.prepare(bare, qwrap.QConfig(scope="kernels"))
    with pytest.raises(NotCalibratedError, match="no scale yet"):
        round_weights(bare, batches)


def test_few_rows_teach_with_more_damping_than_many() -> None:
    """Of fewer rows than inputs most correlations are chance, and errors sent there do not cancel.

    As between words of a few short sentences: a quarter of the directions has most of the power.
    """
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((96, 96)) * np.where(np.arange(96) < 24, 1, 0.2)[:, None]
    source = model_of("MatMul", {"w": rng.standard_normal((96, 64)).astype(np.float32)}, 2, {})

    def rows(count: int) -> torch.Tensor:
        return torch.from_numpy((rng.standard_normal((count, 96)) @ mixing).astype(np.float32))

    few, many, other = rows(40), rows(4000), rows(2000)
    errors = {}
    for name, data in (("few", few), ("many", many)):
        for damping in (None, 0.01):
            wrapped = calibrated(source, [data], weight="int4")
            outcome = round_weights(wrapped, [data, data], damping=damping)
            assert outcome.kept
            with torch.no_grad():
                errors[name, damping] = float((wrapped(other) - qwrap.load(source)(other)).norm())
    assert errors["few", None] < 0.95 * errors["few", 0.01]
    assert errors["many", None] < 1.01 * errors["many", 0.01]
