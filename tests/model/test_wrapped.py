"""Inputs, the module tree, copies, gradients and memory of small models."""

import copy
import io
import pickle
import traceback
import weakref
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from qwrap.errors import InputError, UnsupportedOpError
from qwrap.model import Block, UsePoint, ValuePoint, WrappedModel, load
from qwrap.model.scopes import attribute_path

Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[np.ndarray]]
rng = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def mlp(build: Build) -> onnx.ModelProto:
    """Two layers with a residual, in TorchScript's names."""
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["a"], "/fc1/Gemm", transB=1),
        helper.make_node("Relu", ["a"], ["b"], "/act/Relu"),
        helper.make_node("MatMul", ["b", "onnx::MatMul_7"], ["c"], "/head/head.0/MatMul"),
        helper.make_node("Add", ["head.0.bias", "c"], ["d"], "/head/head.0/Add"),
        helper.make_node("Add", ["d", "x"], ["y"], "/Add"),
    ]
    weights = {
        "fc1.weight": floats(8, 4),
        "fc1.bias": floats(8),
        "onnx::MatMul_7": floats(8, 4),
        "head.0.bias": floats(4),
    }
    return build(nodes, {"x": ["n", 4]}, initializers=weights)


# --- inputs --------------------------------------------------------------------------------------


def test_inputs_by_position_and_by_name_are_the_same(mlp: onnx.ModelProto) -> None:
    model, x = load(mlp), torch.ones(2, 4)
    assert torch.equal(model(x), model(x=x))


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, r"missing \['x'\]"),
        ((torch.ones(1, 4),) * 2, {}, r"got 2 inputs; the graph has 1: \['x'\]"),
        ((), {"z": torch.ones(1, 4)}, r"unexpected \['z'\]"),
        ((torch.ones(1, 4),), {"x": torch.ones(1, 4)}, r"unexpected \['x'\]"),
        ((torch.ones(4),), {}, r"'x': expected 2 dimensions .*got shape \[4\]"),
        ((torch.ones(1, 4, dtype=torch.int64),), {}, r"'x': expected torch.float32, got torch.int"),
        ((np.ones((1, 4), np.float32),), {}, "'x': expected a tensor, got ndarray"),
    ],
)
def test_wrong_inputs_are_named(
    mlp: onnx.ModelProto, args: tuple[object, ...], kwargs: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        load(mlp)(*args, **kwargs)


def test_inputs_that_have_an_initialiser_are_parameters(build: Build, run_ort: Run) -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    proto = build(nodes, {"w": [3], "x": [2, 3]}, initializers={"w": floats(3)})
    model, x = load(proto), floats(2, 3)
    assert model.input_names == ["x"]
    np.testing.assert_array_equal(model(torch.from_numpy(x)).detach(), run_ort(proto, {"x": x})[0])


def test_a_model_without_inputs_or_with_many_outputs_runs(build: Build) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_float=2.0),
        helper.make_node("Add", ["c", "w"], ["y"]),
    ]
    outputs = ["y", "w", "c", "n", "y"]
    arrays = {"w": np.ones(2, np.float32), "n": np.array([3, 4])}
    y, w, c, n, again = load(build(nodes, {}, outputs, arrays))()
    assert (y.tolist(), w.tolist(), c.item(), n.tolist()) == ([3, 3], [1, 1], 2, [3, 4])
    assert torch.equal(y, again)


def test_all_unsupported_operators_are_listed_at_once(build: Build) -> None:
    nodes = [
        helper.make_node("Unknown", ["x"], ["a"], "first", domain="com.example"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gradient", ["x"], ["t"], "second", domain="ai.onnx.preview.training",
                         xs=["x"], y="x"),
    ]  # fmt: skip
    extra = [helper.make_opsetid(d, 1) for d in ("com.example", "ai.onnx.preview.training")]
    proto = build(nodes, {"x": [2]}, ["b", "t"], extra=extra)
    with pytest.raises(UnsupportedOpError) as caught:
        load(proto)
    for words in ("'first'", "com.example::Unknown", "'second'", "training::Gradient-1"):
        assert words in str(caught.value)


# --- the tree ------------------------------------------------------------------------------------


def test_scopes_become_blocks_and_parameters_keep_dotted_names(mlp: onnx.ModelProto) -> None:
    model = load(mlp)
    assert model.tensor_names == {
        "fc1.weight": "fc1.weight",
        "fc1.bias": "fc1.bias",
        "head.0.MatMul.weight": "onnx::MatMul_7",
        "head.0.bias": "head.0.bias",
    }
    assert isinstance(model.get_submodule("head.0"), Block)
    assert "(fc1): Block(weight=[8, 4], bias=[8])" in str(model)
    assert model.stored("onnx::MatMul_7") is model.get_parameter("head.0.MatMul.weight")


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (["net/conv/Conv2D", "net/conv/BiasAdd"], {"net", "net.conv"}),
        (["", ""], set()),
        (["a;b/c/x", "a;b/c/y"], {"a;b", "a;b.c"}),
        (["/graph/half/x", "/graph/half/y"], {"graph_", "graph_.half_"}),
    ],
)
def test_scopes_of_any_exporter_become_blocks(
    names: list[str], paths: set[str], build: Build
) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"], names[0])]
    nodes += [helper.make_node("Neg", ["a"], ["y"], names[1])]
    model = load(build(nodes, {"x": [2]}))
    assert {name for name, _ in model.named_modules() if name} == paths
    assert model(torch.tensor([1.0, -1.0])).tolist() == [-1, 0]


def test_a_scope_that_runs_in_two_pieces_is_inlined(build: Build, run_ort: Run) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "/s/inner/Relu"),
        helper.make_node("Neg", ["a"], ["b"], "/other/Neg"),
        helper.make_node("Add", ["a", "b"], ["c"], "/s/Add"),
        helper.make_node("Abs", ["c"], ["d"], "/s/late/Abs"),
        helper.make_node("Add", ["d", "b"], ["y"], "/other/Add"),
    ]
    proto, x = build(nodes, {"x": [5]}), floats(5)
    model = load(proto)
    np.testing.assert_array_equal(model(torch.from_numpy(x)), run_ort(proto, {"x": x})[0])


def test_a_block_of_which_nothing_is_used_runs(build: Build) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["dead"], "/unused/Relu")]
    nodes += [helper.make_node("Neg", ["x"], ["y"], "/Neg")]
    assert load(build(nodes, {"x": [1]}))(torch.ones(1)).tolist() == [-1]


def test_a_shared_initialiser_is_one_parameter(build: Build) -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["a"], "/one/Add")]
    nodes += [helper.make_node("Mul", ["a", "w"], ["y"], "/two/Mul")]
    model = load(build(nodes, {"x": [2]}, initializers={"w": np.full(2, 3, np.float32)}))
    assert len(list(model.parameters())) == 1
    assert model(torch.ones(2)).tolist() == [12, 12]


def test_constants_are_parameters_and_scalars_are_buffers(build: Build) -> None:
    value = helper.make_tensor("v", TensorProto.FLOAT, [2], [1, 2])
    nodes = [
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("Add", ["x", "w"], ["a"], "/s/Add"),
        helper.make_node("Where", ["m", "a", "scalar"], ["y"], "/s/Where"),
    ]
    arrays = {"scalar": np.array(7, np.float32), "m": np.array([True, False])}
    model = load(build(nodes, {"x": [2]}, initializers=arrays))
    assert [p.tolist() for p in model.parameters()] == [[1, 2]]
    assert [b.item() for k, b in model.named_buffers() if k in model.state_dict()] == [7]
    assert model(torch.zeros(2)).tolist() == [1, 7]


@pytest.mark.parametrize(
    ("name", "op_type", "learnt"),
    [
        ("val_82", "Mul", False),
        ("/attn/Constant_28_output_0", "Div", False),
        ("blocks.0.gamma", "Mul", True),
        ("onnx::Add_12", "Add", True),
    ],
)
def test_a_single_number_that_scales_is_learnt_if_it_has_a_name(
    name: str, op_type: str, learnt: bool, build: Build
) -> None:
    nodes = [helper.make_node(op_type, ["x", name], ["y"])]
    model = load(build(nodes, {"x": [2]}, initializers={name: np.ones(1, np.float32)}))
    assert len(list(model.parameters())) == learnt
    assert list(model.tensor_names.values()) == [name]


def test_names_of_the_module_itself_are_never_taken(mlp: onnx.ModelProto) -> None:
    model = load(mlp)
    taken = set(dir(model)) - {"fc1", "head", "act"}
    taken -= {name for name in taken if name.startswith("___")}  # torch.compile leaves marks
    assert [name for name in taken if attribute_path([name]) == (name,)] == []


# --- copies --------------------------------------------------------------------------------------


def with_taps(model: WrappedModel) -> WrappedModel:
    model.attach({
        ValuePoint("a"): torch.nn.Hardtanh(-0.5, 0.5),
        ValuePoint("x"): torch.nn.PReLU(),
        UsePoint("/head/head.0/MatMul", 1): torch.nn.Tanh(),
    })
    return model


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_computes_the_same_and_shares_nothing(
    mlp: onnx.ModelProto, how: str, taps: bool
) -> None:
    model, x = load(mlp), torch.from_numpy(floats(3, 4))
    if taps:
        with_taps(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    before = model(x)
    assert torch.equal(other(x), before)
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), before)
    with other.watching({"b": lambda t: t}):  # it can generate code again
        assert torch.equal(other(x), before)
    other.attach({})


def test_a_block_alone_can_be_copied_and_pickled(mlp: onnx.ModelProto) -> None:
    block, x = with_taps(load(mlp)).get_submodule("fc1"), torch.ones(1, 4)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x), block(x))


def test_operators_that_are_told_their_type_can_be_copied(build: Build) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Range", ["zero", "n", "one"], ["r"]),
        helper.make_node("ConstantOfShape", ["s"], ["z"]),
        helper.make_node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["z", "f"], ["y"]),
    ]
    arrays = {"zero": np.array(0), "one": np.array(1)}
    model = load(build(nodes, {"x": ["n"]}, initializers=arrays))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(torch.ones(3)).tolist() == [0, 1, 2]


# --- running -------------------------------------------------------------------------------------


def test_a_traceback_shows_the_node(mlp: onnx.ModelProto) -> None:
    with pytest.raises(RuntimeError) as caught:
        load(mlp)(torch.ones(1, 3))
    text = "".join(traceback.format_exception(caught.value))
    assert "gemm" in text
    assert "# '/fc1/Gemm'" in text


def test_gradients_equal_finite_differences(mlp: onnx.ModelProto) -> None:
    model = load(mlp).double()
    x = torch.from_numpy(floats(2, 4)).double()
    parameters = dict(model.named_parameters())

    def forward(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(parameters, values, strict=True))
        result = torch.func.functional_call(model, given, (x,))
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.autograd.gradcheck(forward, tuple(parameters.values()))


def test_a_training_step_lowers_the_loss(mlp: onnx.ModelProto) -> None:
    model, x = load(mlp), torch.from_numpy(floats(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


@pytest.mark.parametrize("inside_if", [False, True])
def test_a_value_is_freed_after_its_last_use(build: Build, inside_if: bool) -> None:
    chain = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Abs", ["b"], ["c"]),
    ]
    nodes, output = chain, "c"
    if inside_if:
        body = helper.make_graph(chain, "g", [], [onnx.ValueInfoProto(name="c")])
        empty = helper.make_node("Identity", ["x"], ["o"])
        other = helper.make_graph([empty], "h", [], [onnx.ValueInfoProto(name="o")])
        nodes = [helper.make_node("If", ["k"], ["y"], then_branch=body, else_branch=other)]
        output = "y"
    model = load(build(nodes, {"x": [2], "k": (TensorProto.BOOL, [])}, [output]))
    born: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    watchers = {
        "a": lambda t: born.append(weakref.ref(t)),
        "c": lambda _: alive.append(born[0]() is not None),
    }
    with torch.no_grad(), model.watching(watchers):
        model(x=torch.ones(2), k=torch.tensor(True))
    assert alive == [False]


def test_half_precision_and_the_meta_device(mlp: onnx.ModelProto) -> None:
    x = torch.from_numpy(floats(2, 4))
    expected = load(mlp)(x)
    half = load(mlp).half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=1e-2, atol=1e-2)  # 10 bits
    assert load(mlp).to("meta")(x.to("meta")).shape == (2, 4)


def test_a_model_that_cannot_be_rewritten_stays_as_it_was(
    mlp: onnx.ModelProto, build: Build
) -> None:
    from qwrap.graph import OnnxGraph, read_model

    model, x = load(mlp), torch.ones(1, 4)
    before = model(x)
    node = helper.make_node("Unknown", ["x"], ["y"], domain="com.example")
    extra = [helper.make_opsetid("com.example", 1)]
    bad = OnnxGraph(read_model(build([node], {"x": [2]}, extra=extra)))
    with pytest.raises(UnsupportedOpError):
        model.rewrite(bad, ())
    assert torch.equal(model(x), before)


def test_operators_made_by_functions_can_be_pickled() -> None:
    text = """
        <ir_version: 8, opset_import: ["": 13]>
        g (float[2,3] x) => (float[2,1] y) { y = ReduceMean <axes: ints = [1]> (x) }
    """
    model = load(onnx.parser.parse_model(text))
    x = torch.arange(6.0).reshape(2, 3)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), x.mean(1, keepdim=True))


@pytest.mark.parametrize("name", ["quantization", "before_loading", "plan"])
def test_a_scope_may_have_a_name_that_the_model_uses_itself(name: str) -> None:
    assert attribute_path([name]) == (f"{name}_",)


def test_a_model_of_buffers_alone_makes_its_outputs_where_they_are(build: Build) -> None:
    nodes = [helper.make_node("Add", ["half", "half"], ["y"])]
    model = load(build(nodes, {}, initializers={"half": np.float32(0.5)}))
    assert model().item() == 1
    assert model.to("meta")().is_meta
