"""Files with conversions beside those of onnxruntime's own tool, given the same dictionary."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import qwrap
from qwrap.errors import ConfigError

U8, U16, S16 = QuantType.QUInt8, QuantType.QUInt16, QuantType.QInt16
KINDS = ("Sigmoid", "Cos", "Sin", "Tanh", "Mul", "Relu", "Cos", "Sigmoid")
# The dictionary of https://github.com/microsoft/onnxruntime/pull/19925.
LONG = {
    "Op2_out": [{"quant_type": U8, "convert": {"quant_type": U16, "recv_nodes": {"Op4"}}}],
    "Op3_out": [{"quant_type": U8, "convert": {"quant_type": U16, "recv_nodes": {"Op5"}}}],
    "Op4_out": [{"quant_type": U16}],
    "Op5_out": [{"quant_type": U16, "convert": {"quant_type": U8, "recv_nodes": {"Op6"}}}],
}


def pull_request_model(kinds: tuple[str, ...] = KINDS) -> onnx.ModelProto:
    """The example of the pull request: Op1 … Op8, two inputs and three outputs."""
    edges = [
        (["input_0"], "Op1_out"), (["input_1"], "Op2_out"), (["Op1_out"], "Op3_out"),
        (["Op2_out"], "Op4_out"), (["Op3_out", "Op4_out"], "Op5_out"), (["Op5_out"], "output_0"),
        (["Op2_out"], "output_1"), (["Op2_out"], "output_2"),
    ]  # fmt: skip
    nodes = [
        helper.make_node(kind, read, [made], name=f"Op{i}")
        for i, (kind, (read, made)) in enumerate(zip(kinds, edges, strict=True), 1)
    ]
    return model_of(nodes, ["input_0", "input_1"], ["output_0", "output_1", "output_2"], [1, 2, 3])


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[str],
    outputs: list[str],
    shape: list[int],
    **weights: np.ndarray,
) -> onnx.ModelProto:
    def float_of(name: str, dims: list[int] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    graph = helper.make_graph(
        nodes,
        "g",
        [float_of(name, shape) for name in inputs],
        [float_of(name, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


class Reader(CalibrationDataReader):
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def batches_for(model: onnx.ModelProto, count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input
    }
    return [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def by_tool(
    model: onnx.ModelProto, overrides: dict[str, Any], path: Path, **settings: Any
) -> onnx.ModelProto:
    """What onnxruntime's tool writes."""
    options = {"TensorQuantOverrides": copy.deepcopy(overrides), "ForceQuantizeNoInputCheck": True}
    kinds = {node.op_type for node in model.graph.node}
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            copy.deepcopy(model),
            path,
            Reader(batches_for(model)),
            quant_format=QuantFormat.QDQ,
            activation_type=settings.pop("activation_type", U8),
            op_types_to_quantize=sorted(kinds),
            extra_options=options,
            **settings,
        )
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(path)


def by_qwrap(
    model: onnx.ModelProto, config: qwrap.QConfig, path: Path
) -> tuple[qwrap.WrappedModel, onnx.ModelProto]:
    wrapped = qwrap.load(copy.deepcopy(model))
    qwrap.prepare(wrapped, config)
    qwrap.calibrate(wrapped, batches_for(model), progress=False)
    qwrap.export(wrapped, path)
    return wrapped, onnx.load(path)


def chains(model: onnx.ModelProto) -> dict[tuple[str, int], tuple[str, ...]]:
    """What each node, and each graph output, reads: the types on the way from where it is made.

    Pairs that are there twice, for a graph output or a conversion of its own, count once.
    """
    made = {output: node for node in model.graph.node for output in node.output}
    stored = {init.name: init.data_type for init in model.graph.initializer}

    def way(name: str) -> tuple[str, ...]:
        node = made.get(name)
        if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return (name if node is None else f"{node.name}:{list(node.output).index(name)}",)
        carrier = node.input[2] if len(node.input) > 2 else node.input[0]
        dtype = TensorProto.DataType.Name(stored[carrier]).lower()
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            axis = [a.i for a in node.attribute if a.name == "axis"]
            count = 1 if not axis else "per channel"
            return (node.input[0], dtype, str(count))
        if node.op_type == "DequantizeLinear":
            return way(node.input[0])
        return (*way(node.input[0]), dtype)

    found = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            found |= {(node.name, i): way(name) for i, name in enumerate(node.input)}
    return found | {("output", i): way(v.name) for i, v in enumerate(model.graph.output)}


def nodes_of(model: onnx.ModelProto) -> Counter[tuple[Any, ...]]:
    """Every node with its name, domain and what its inputs are: initialisers, nodes' outputs."""
    made = {o: (node.name, i) for node in model.graph.node for i, o in enumerate(node.output)}
    return Counter(
        (node.op_type, node.name, node.domain, tuple(made.get(i, i) for i in node.input))
        for node in model.graph.node
    )


def initializers_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}


def outputs_of(path: Path, batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [output for batch in batches for output in session.run(None, batch)]


def regions(*selectors: str | list[str]) -> qwrap.QConfig:
    config = qwrap.QConfig()
    for selector in selectors:
        config.set(selector, activation="uint16")
    return config


@pytest.mark.parametrize(
    "config",
    [regions(["Op4", "Op5"]), regions("Op4_out"), qwrap.QConfig.from_overrides(LONG)],
    ids=["nodes", "tensor", "dictionary"],
)
def test_the_example_of_the_pull_request_is_onnxruntimes_graph(
    config: qwrap.QConfig, tmp_path: Path
) -> None:
    model = pull_request_model()
    theirs = by_tool(model, LONG, tmp_path / "theirs.onnx")
    _, ours = by_qwrap(model, config, tmp_path / "ours.onnx")
    assert nodes_of(ours) == nodes_of(theirs)
    mine, other = initializers_of(ours), initializers_of(theirs)
    assert mine.keys() == other.keys()
    assert {name: mine[name].dtype for name in mine} == {name: other[name].dtype for name in other}
    assert chains(ours) == chains(theirs)


def test_given_its_scales_the_tool_writes_what_computes_the_same(tmp_path: Path) -> None:
    model = pull_request_model()
    wrapped, ours = by_qwrap(model, regions(["Op4", "Op5"]), tmp_path / "ours.onnx")
    overrides = wrapped.plan.to_overrides(wrapped)
    theirs = by_tool(model, overrides, tmp_path / "theirs.onnx")
    mine, other = initializers_of(ours), initializers_of(theirs)
    assert nodes_of(ours) == nodes_of(theirs)
    assert all(np.array_equal(mine[name], other[name]) for name in other)
    batches = batches_for(model, 8)
    results = outputs_of(tmp_path / "ours.onnx", batches)
    expected = outputs_of(tmp_path / "theirs.onnx", batches)
    assert all(map(np.array_equal, results, expected))


# --- the five scenarios of onnxruntime's tool ----------------------------------------------------


def small_model(text: str, outputs: str, **weights: np.ndarray) -> onnx.ModelProto:
    """``"t = Sigmoid(x); u = Cos(t)"``: nodes are named after what they make."""
    nodes = []
    for line in text.split(";"):
        made, call = (part.strip() for part in line.split("="))
        kind, read = call.rstrip(")").split("(")
        inputs = [name.strip() for name in read.split(",")]
        attributes = {"perm": [0, 2, 1]} if kind == "Transpose" else {}
        nodes.append(helper.make_node(kind, inputs, [made], name=f"n_{made}", **attributes))
    return model_of(nodes, ["x"], outputs.split(), [1, 4, 4], **weights)


def converts(**more: Any) -> dict[str, Any]:
    return {"t": [{"quant_type": U8, "convert": {"quant_type": U16, **more}}]}


TWO = "t = Sigmoid(x); a = Cos(t); b = Sin(t)"
SCENARIOS = {
    "1: all read the converted type": (TWO, "a b", converts()),
    "1: all are named": (TWO, "a b", converts(recv_nodes={"n_a", "n_b"})),
    "2: some read it": (TWO, "a b", converts(recv_nodes={"n_b"})),
    "3: a graph output, all read it": (TWO, "a b t", converts()),
    "4: a graph output, some read it": (TWO, "a b t", converts(recv_nodes={"n_a"})),
    "5: a graph output that nothing reads": ("t = Sigmoid(x)", "t", converts()),
    "a graph input": (
        "t = Sigmoid(x); a = Cos(x)",
        "t a",
        {"x": [{"convert": {"quant_type": U16, "recv_nodes": {"n_a"}}}]},
    ),
    "one node reads it twice": ("t = Sigmoid(x); a = Mul(t, t)", "a", converts()),
    "the type alone": (TWO, "a b", {"t": [{"quant_type": U16}]}),
    "three types": (
        TWO,
        "a b",
        {
            "x": [{"quant_type": U16}],
            "t": [{"quant_type": S16, "convert": {"quant_type": U8, "symmetric": True}}],
            "b": [{"quant_type": QuantType.QInt8}],
        },
    ),
    "moved as converted": (
        "t = Sigmoid(x); m = Transpose(t); a = Cos(m); b = Sin(t)",
        "a b",
        converts(recv_nodes={"n_m"}),
    ),
    "moved as it is": (
        "t = Sigmoid(x); m = Transpose(t); a = Cos(m); b = Sin(t)",
        "a b",
        converts(recv_nodes={"n_b"}),
    ),
    "converted once moved": (
        "t = Sigmoid(x); m = Transpose(t); a = Cos(m); b = Sin(m)",
        "a b",
        {"m": [{"convert": {"quant_type": U16, "recv_nodes": {"n_a"}}}]},
    ),
    "converted, moved and converted back": (
        "t = Sigmoid(x); m = Transpose(t); a = Cos(m); b = Sin(m); c = Tanh(t)",
        "a b c",
        converts(recv_nodes={"n_m"})
        | {"m": [{"convert": {"quant_type": U8, "recv_nodes": ["n_a"]}}]},
    ),
    "a graph input that is moved": (
        "m = Transpose(x); a = Cos(m); b = Sin(x)",
        "a b",
        {"x": [{"quant_type": U16, "convert": {"quant_type": U8, "recv_nodes": {"n_b"}}}]},
    ),
    "a graph input that is moved as converted": (
        "m = Transpose(x); a = Cos(m); b = Sin(x)",
        "a b",
        {
            "x": [{"convert": {"quant_type": U16, "recv_nodes": {"n_m"}}}],
            "m": [{"convert": {"quant_type": S16}}],
        },
    ),
    "a Relu that reads what is converted": (
        "t = Mul(x, x); r = Relu(t); a = Cos(r)",
        "a",
        converts(recv_nodes={"n_r"}),
    ),
    "a Relu that writes what is converted": (
        "u = Mul(x, x); t = Relu(u); a = Cos(t)",
        "a",
        converts(recv_nodes={"n_a"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCENARIOS.values(), ids=SCENARIOS)
def test_each_node_reads_the_types_that_onnxruntimes_tool_gives_it(
    case: tuple[str, str, dict[str, Any]], tmp_path: Path
) -> None:
    text, outputs, overrides = case
    model = small_model(text, outputs)
    as_sets = copy.deepcopy(overrides)
    for (said,) in as_sets.values():  # onnxruntime's tool fails for lists
        if "recv_nodes" in said.get("convert", {}):
            said["convert"]["recv_nodes"] = set(said["convert"]["recv_nodes"])
    theirs = by_tool(model, as_sets, tmp_path / "theirs.onnx")
    config = qwrap.QConfig.from_overrides(overrides)
    wrapped, ours = by_qwrap(model, config, tmp_path / "ours.onnx")
    assert chains(ours) == chains(theirs)
    batches = batches_for(model)
    report = qwrap.verify(wrapped, tmp_path / "ours.onnx", batches, progress=False)
    assert report.differing_codes == report.specification.differing == len(report.skipped) == 0
    # The dictionary that the plan makes says the same to both.
    again = wrapped.plan.to_overrides(wrapped)
    theirs = by_tool(model, again, tmp_path / "theirs.onnx")
    assert chains(ours) == chains(theirs)
    results = outputs_of(tmp_path / "ours.onnx", batches)
    assert all(map(np.array_equal, results, outputs_of(tmp_path / "theirs.onnx", batches)))
    config = qwrap.QConfig.from_overrides(again, scope="named")
    by_qwrap(model, config, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "ours.onnx").read_bytes()


# --- weights and biases --------------------------------------------------------------------------


def layers() -> onnx.ModelProto:
    """Convolutions, a MatMul and a Gemm, with Adds and Muls of constants between."""
    rng = np.random.default_rng(3)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.4, shape).astype(np.float32)

    text = [
        ("Conv", ["x", "w1", "b1"], "c1"), ("Sigmoid", ["c1"], "s"),
        ("Conv", ["s", "w2", "b2"], "c2"),
        ("Add", ["c2", "s"], "d"), ("Mul", ["d", "k"], "e"), ("Reshape", ["e", "to"], "f"),
        ("MatMul", ["f", "w3"], "m"), ("Gemm", ["m", "w4", "b4"], "y"),
    ]  # fmt: skip
    nodes = [helper.make_node(kind, read, [made], name=f"n_{made}") for kind, read, made in text]
    weights = {
        "w1": drawn(4, 3, 1, 1), "b1": drawn(4), "w2": drawn(4, 4, 1, 1), "b2": drawn(4),
        "k": drawn(1, 4, 1, 1), "to": np.array([1, 64]), "w3": drawn(64, 6), "w4": drawn(6, 5),
        "b4": drawn(5),
    }  # fmt: skip
    return model_of(nodes, ["x"], ["y"], [1, 3, 4, 4], **weights)


def settings() -> dict[str, Any]:
    # Weights that codes cannot reach end at -128 with onnxruntime's tool, at -127 here.
    return {"scope": "all", "weight_method": "minmax", "method": "minmax"}


@pytest.mark.parametrize("selectors", [["n_c2"], ["n_c2", "n_d"], ["n_m", "n_y"], ["n_c1", "n_e"]])
def test_layers_in_16_bit_compute_what_the_tools_file_does(
    selectors: list[str], tmp_path: Path
) -> None:
    model, config = layers(), qwrap.QConfig(**settings())
    config.set(selectors, activation="uint16")
    wrapped, ours = by_qwrap(model, config, tmp_path / "ours.onnx")
    overrides = wrapped.plan.to_overrides(wrapped)
    theirs = by_tool(model, overrides, tmp_path / "theirs.onnx", weight_type=QuantType.QInt8)
    assert chains(ours) == chains(theirs)
    mine = initializers_of(ours)
    other = {  # biases' scales are called b_quantized_scale there
        name.replace("_quantized_", "_"): array for name, array in initializers_of(theirs).items()
    }
    assert mine.keys() == other.keys()
    for name in mine:
        assert np.array_equal(mine[name], other[name]), name
    batches = batches_for(model)
    results = outputs_of(tmp_path / "ours.onnx", batches)
    assert all(map(np.array_equal, results, outputs_of(tmp_path / "theirs.onnx", batches)))
    again = qwrap.QConfig.from_overrides(overrides, scope="named")
    by_qwrap(model, again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "ours.onnx").read_bytes()


def test_what_an_absorbed_activation_writes_may_be_converted(tmp_path: Path) -> None:
    source, config = layers(), qwrap.QConfig(**settings())
    source.graph.node[1].op_type = "Relu"
    config.set("n_c1", activation="uint16")
    config.set("n_s", activation="uint16")
    wrapped, _ = by_qwrap(source, config, tmp_path / "ours.onnx")
    assert wrapped.plan.nodes["n_s"].role == "absorbed"
    assert wrapped.plan.tensors["s"].conversions
    overrides = wrapped.plan.to_overrides(wrapped)
    again = qwrap.QConfig.from_overrides(overrides, scope="named")
    by_qwrap(source, again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "ours.onnx").read_bytes()


def test_types_that_the_dictionary_lacks_are_refused_with_the_tensor() -> None:
    model = small_model(TWO, "a b")
    for kind, message in (("int5", "'x' is of int5, which onnxruntime's"),):
        wrapped = qwrap.load(model)
        plan = qwrap.prepare(wrapped, qwrap.QConfig(activation=kind, scope="all"))
        with pytest.raises(ConfigError, match=message):
            plan.to_overrides()
    config = qwrap.QConfig(scope="all")
    config.set("n_a", activation="uint16")
    config.set("n_b", activation="int16")
    plan = qwrap.prepare(qwrap.load(model), config)
    with pytest.raises(ConfigError, match="'t' is converted to several types, uint16, int16"):
        plan.to_overrides()
    spec = qwrap.QuantSpec(dtype="int8", axis=0, block_size=16)
    plan = qwrap.prepare(qwrap.load(layers()), qwrap.QConfig(weight=spec, scope="all"))
    with pytest.raises(ConfigError, match="has scales in blocks of 16"):
        plan.to_overrides()


def test_a_plan_without_scales_says_types_alone() -> None:
    config = qwrap.QConfig(**settings())
    config.set("n_c2", activation="uint16")
    plan = qwrap.prepare(qwrap.load(layers()), config)
    found = plan.to_overrides()
    assert found["s"] == [
        {
            "quant_type": U8,
            "symmetric": False,
            "convert": {"quant_type": U16, "symmetric": False, "recv_nodes": {"n_c2"}},
        }
    ]
    assert found["w1"] == [{"quant_type": QuantType.QInt8, "axis": 0, "symmetric": True}]
    assert "b1" not in found


# --- settings of single tensors, beside what onnxruntime's tool makes of them --------------------


def array(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(value, dtype=dtype)  # onnxruntime takes no Python numbers for activations


SETTINGS: dict[str, dict[str, Any]] = {
    "per tensor": {"w1": [{"quant_type": QuantType.QInt8}], "w3": [{"symmetric": True}]},
    "per channel": {
        "w1": [{"axis": 0, "quant_type": QuantType.QInt8}],
        "w3": [{"axis": -1, "quant_type": QuantType.QInt16}],
    },
    "unsigned": {"w1": [{"quant_type": QuantType.QUInt8, "symmetric": False}]},
    "half the codes": {"w1": [{"reduce_range": True}], "w2": [{"axis": 0, "reduce_range": True}]},
    "ranges": {
        "w1": [{"axis": 0, "rmin": -3.0 - i, "rmax": 3.0 + i} for i in range(4)],
        "k": [{"rmin": array(-2.0), "rmax": array(2.0)}],
        "c1": [{"rmin": array(-1.0), "rmax": array(1.0)}],
        "d": [{"rmax": array(3.0)}],
    },
    "scales": {
        "w1": [
            {"axis": 0, "scale": array(0.01 * i), "zero_point": array(0, np.int8)}
            for i in (1, 2, 3, 4)
        ],
        "c1": [{"scale": array(1 / 50), "zero_point": array(100, np.uint8)}],
        "k": [{"scale": array(0.02), "zero_point": array(100, np.uint8)}],
    },
    "biases as weights": {
        "b1": [{"quant_type": QuantType.QInt8}],
        "b2": [{"axis": 0, "quant_type": QuantType.QInt16}],
    },
    "symmetric": {
        "c1": [{"symmetric": True}],
        "d": [{"quant_type": QuantType.QInt8, "symmetric": True}],
        "c2": [{"quant_type": S16, "symmetric": True}],
    },
    "16 bit": {"c1": [{"quant_type": U16}], "k": [{"quant_type": S16}]},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_codes_and_scales_are_those_of_onnxruntimes_tool(case: str, tmp_path: Path) -> None:
    model, overrides, per_channel = layers(), SETTINGS[case], case != "per channel"
    model.graph.node[1].op_type = "LeakyRelu"  # a Sigmoid's range is known here
    theirs = by_tool(
        model,
        overrides,
        tmp_path / "theirs.onnx",
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
    )
    config = qwrap.QConfig.from_overrides(overrides, per_channel=per_channel, **settings())
    wrapped, ours = by_qwrap(model, config, tmp_path / "ours.onnx")
    assert chains(ours) == chains(theirs)
    other = {
        name.replace("_quantized_", "_"): found for name, found in initializers_of(theirs).items()
    }
    mine = initializers_of(ours)
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].dtype == other[name].dtype
        # Ranges are observed in torch here and in onnxruntime there, which sum in other orders.
        rtol = 1e-6 if mine[name].dtype == np.float32 else 0
        found, expected = (a[name].astype(np.float64).reshape(-1) for a in (mine, other))
        np.testing.assert_allclose(found, expected, rtol, err_msg=name)
    report = qwrap.verify(wrapped, tmp_path / "ours.onnx", batches_for(model), progress=False)
    assert report.differing_codes == 0
