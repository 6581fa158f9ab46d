"""The module tree from node names of exporters: TensorFlow, Paddle, torch, or none at all."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from qwrap.model import Block, WrappedModel, load
from qwrap.model.scopes import DYNAMO_SCOPES

Build = Callable[..., onnx.ModelProto]
Node = tuple[str, list[str], str, str]  # operator, inputs, output, name


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def wrapped(
    build: Build, nodes: list[Node], weights: Mapping[str, np.ndarray], shape: list[int]
) -> WrappedModel:
    made = [helper.make_node(kind, inputs, [out], name) for kind, inputs, out, name in nodes]
    return load(build(made, {"x": shape}, [nodes[-1][2]], weights))


def blocks(model: WrappedModel) -> set[str]:
    """Paths of the modules that run nodes."""
    return {name for name, m in model.named_modules() if name and isinstance(m, Block) and m.source}


def test_tensorflow_names_nest(build: Build) -> None:
    prefix = "StatefulPartitionedCall/model/block_1/"
    nodes = [
        ("Conv", ["x", f"{prefix}conv/Conv2D/ReadVariableOp:0"], "a", f"{prefix}conv/Conv2D"),
        ("Add", ["a", "const_fold_opt__12"], "b", f"{prefix}conv/BiasAdd"),
        ("Relu", ["b"], "c", f"{prefix}relu/Relu"),
        ("Add", ["c", "x"], "y", f"{prefix}add/add"),
    ]
    weights = {
        f"{prefix}conv/Conv2D/ReadVariableOp:0": floats(3, 3, 1, 1),
        "const_fold_opt__12": floats(3, 1, 1),
    }
    model = wrapped(build, nodes, weights, [1, 3, 4, 4])
    base = "StatefulPartitionedCall.model.block_1"
    assert blocks(model) >= {base, f"{base}.conv", f"{base}.relu", f"{base}.add"}
    assert [name for name, _ in model.named_parameters()] == [
        f"{base}.conv.Conv.weight",
        f"{base}.conv.Add.b",
    ]


def test_paddle_names_tell_layers_by_their_parameters(build: Build) -> None:
    nodes = [
        ("Conv", ["x", "conv2d_0.w_0"], "conv2d_0.tmp_0", "p2o.Conv.0"),
        ("Relu", ["conv2d_0.tmp_0"], "relu_0.tmp_0", "p2o.Relu.0"),
        ("Conv", ["relu_0.tmp_0", "conv2d_1.w_0"], "y", "p2o.Conv.1"),
    ]
    weights = {"conv2d_0.w_0": floats(3, 3, 1, 1), "conv2d_1.w_0": floats(3, 3, 1, 1)}
    model = wrapped(build, nodes, weights, [1, 3, 4, 4])
    assert blocks(model) == {"conv2d_0", "conv2d_1"}
    assert [name for name, _ in model.named_parameters()] == ["conv2d_0.w_0", "conv2d_1.w_0"]


def test_a_nameless_graph_nests_by_its_dotted_parameters(build: Build) -> None:
    nodes = [
        ("Conv", ["x", "layer1.0.conv1.weight"], "a", ""),
        ("Relu", ["a"], "b", ""),
        ("Conv", ["b", "layer1.0.conv2.weight"], "c", ""),
        ("Add", ["c", "x"], "d", ""),
        ("Conv", ["d", "layer2.0.conv1.weight"], "y", ""),
    ]
    weights = {
        f"layer{i}.weight": floats(3, 3, 1, 1) for i in ("1.0.conv1", "1.0.conv2", "2.0.conv1")
    }
    model = wrapped(build, nodes, weights, [1, 3, 4, 4])
    assert "relu" in model.get_submodule("layer1.0").source  # between two of its layers
    assert "add" in model.source
    assert blocks(model) >= {"layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"}


def test_a_graph_without_any_names_is_one_block(build: Build) -> None:
    nodes = [("MatMul", ["x", "3"], "a", ""), ("Add", ["4", "a"], "y", "")]
    model = wrapped(build, nodes, {"3": floats(4, 4), "4": floats(4)}, [2, 4])
    assert blocks(model) == set()
    assert {key: list(p.shape) for key, p in model.named_parameters()} == {"3": [4, 4], "4": [4]}
    model(torch.ones(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_node_without_scope_inside_a_layer_runs_with_it(build: Build) -> None:
    nodes = [
        ("Relu", ["x"], "a", "/stem/Relu"),
        ("Neg", ["a"], "b", "/layers/layers.0/mlp/Neg"),
        ("Abs", ["b"], "c", "rewritten_1"),
        ("Exp", ["c"], "d", "rewritten_2"),
        ("Add", ["a", "d"], "e", "/layers/layers.0/mlp/Add"),
        ("Abs", ["e"], "f", "rewritten_3"),
        ("Neg", ["f"], "y", "/layers/layers.1/Neg"),
    ]
    model = wrapped(build, nodes, {}, [3])
    mlp = model.get_submodule("layers.0.mlp")
    assert all(name in mlp.source for name in ("'rewritten_1'", "'rewritten_2'"))
    assert "'rewritten_3'" in model.get_submodule("layers").source
    x = torch.tensor([1.0, -2.0, 3.0])
    a = x.relu()
    assert torch.equal(model(x), -(a + a.neg().abs().exp()).abs())


def test_a_layer_interrupted_by_an_unscoped_node_with_two_homes_still_runs(build: Build) -> None:
    nodes = [
        ("Relu", ["x"], "a", "/one/Relu"),
        ("Neg", ["x"], "b", "/two/Neg"),
        ("Add", ["a", "b"], "c", "between"),
        ("Abs", ["c"], "d", "/one/Abs"),
        ("Add", ["c", "d"], "y", "/two/Add"),
    ]
    model, x = wrapped(build, nodes, {}, [2]), torch.tensor([1.0, -2.0])
    total = x.relu() - x
    assert torch.equal(model(x), total + total.abs())


def test_a_convolution_fused_with_its_normalisation_runs_where_its_weights_are(
    build: Build,
) -> None:
    weights = {"layer1.conv1.weight": floats(3, 3, 1, 1), "layer1.conv1.weight_bias": floats(3)}
    proto = build([helper.make_node("Conv", ["x", *weights], ["y"])], {"x": [1, 3, 2, 2]})
    for key, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, key))
    entry = proto.graph.node[0].metadata_props.add()
    entry.key, entry.value = DYNAMO_SCOPES, "['', 'layer1', 'layer1.bn1', 'batch_norm']"
    assert "conv(" in load(proto).get_submodule("layer1.conv1").source
