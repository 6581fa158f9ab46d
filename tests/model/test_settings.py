"""What ``load`` may be asked for: expansion of functions, and another type to compute in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qwrap
from qwrap.errors import ConfigError, UnsupportedOpError
from qwrap.model import load

Build = Callable[..., onnx.ModelProto]
Run = Callable[..., list[np.ndarray]]
X = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)


@pytest.fixture
def norm(build: Build) -> onnx.ModelProto:
    """Operators that have both an implementation and a function body."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "w", "b"], ["n"], "/block/norm"),
        helper.make_node("Gelu", ["n"], ["g"], "/block/gelu"),
        helper.make_node("Softmax", ["g"], ["y"], "/block/softmax"),
    ]
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=4).astype(np.float32) for name in "wb"}
    return build(nodes, {"x": ["n", 3, 4]}, initializers=arrays, opset=20)


def test_expanded_or_not_a_model_computes_the_same(
    norm: onnx.ModelProto, run_ort: Run, run_qwrap: Run
) -> None:
    expected = run_ort(norm, {"x": X})[0]
    for expand in ("auto", "always", "never"):
        model = load(norm, expand=expand)
        # float32 in two orders of operations
        np.testing.assert_allclose(run_qwrap(model, {"x": X})[0], expected, rtol=2e-5, atol=1e-6)
        assert ("# '/block/gelu'" in model.block.source) == (expand != "always")


def test_an_expanded_node_is_a_block_of_its_own(norm: onnx.ModelProto) -> None:
    model = load(norm, expand="always")
    assert model.get_submodule("block.norm").source
    assert {model.tensor_names[name] for name, _ in model.named_parameters()} == {"w", "b"}


def test_never_leaves_out_what_only_a_function_body_computes(build: Build) -> None:
    proto = build([helper.make_node("Own", ["x"], ["y"], domain="own")], {"x": [2]},
                  extra=[helper.make_opsetid("own", 1)])  # fmt: skip
    body = [helper.make_node("Neg", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("own", "Own", ["a"], ["b"], body, opsets))
    assert load(proto, expand="never")(torch.ones(2)).tolist() == [-1, -1]
    del proto.functions[:]
    with pytest.raises(UnsupportedOpError, match="own::Own"):
        load(proto)


def test_another_word_than_the_three_is_refused(norm: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match="choose one of auto, never, always"):
        load(norm, expand="sometimes")


# --- dtype ---------------------------------------------------------------------------------------


@pytest.fixture
def mixed(build: Build) -> onnx.ModelProto:
    """Weights, a float constant, a Cast to float32, a shape turned into a float, a comparison."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Greater", ["m", "zero"], ["p"]),
        helper.make_node("Cast", ["p"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["sf"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["sf"], ["size"], keepdims=0),
        helper.make_node("ConstantOfShape", ["s"], ["fill"],
                         value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])),
        helper.make_node("MatMul", ["fill", "w"], ["f"]),
        helper.make_node("Mul", ["m", "mask"], ["r"]),
        helper.make_node("Div", ["r", "size"], ["d"]),
        helper.make_node("Add", ["d", "f"], ["y"]),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 4)).astype(np.float32), "zero": np.float32(0)}
    return build(nodes, {"x": ["n", 3, 4]}, ["y", "s"], arrays)


@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)]
)
def test_everything_that_is_float32_is_computed_in_another_type(
    mixed: onnx.ModelProto, dtype: torch.dtype, digits: float
) -> None:
    model, reference = load(mixed, dtype=dtype), load(mixed)
    x = torch.from_numpy(X)
    y, shape = model(x)
    assert y.dtype == dtype
    assert shape.dtype == torch.int64
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = reference(x)[0].double()
    assert (y.double() - expected).abs().max() <= digits * expected.abs().max()
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_type_that_is_no_float_is_refused(mixed: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8; choose one of torch\.float32"):
        load(mixed, dtype=torch.int8)


def test_autocast_computes_matrix_products_in_its_type(mixed: onnx.ModelProto) -> None:
    model, x = load(mixed), torch.from_numpy(X)
    seen: dict[str, torch.dtype] = {}
    with (
        model.watching({"m": lambda t: seen.update(m=t.dtype)}),
        torch.autocast("cpu", torch.bfloat16),
    ):
        y, _ = model(x)
    assert seen["m"] == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x)[0], rtol=3e-2, atol=3e-2)  # 8 bits


def test_what_was_not_trained_is_written_back_as_it_was(
    mixed: onnx.ModelProto, tmp_path: Path
) -> None:
    model = load(mixed, dtype=torch.bfloat16)
    qwrap.export(model, tmp_path / "same.onnx")
    assert onnx.load(tmp_path / "same.onnx") == mixed
    with torch.no_grad():
        model.stored("w").mul_(2)
    qwrap.export(model, tmp_path / "trained.onnx")
    (w, zero) = onnx.load(tmp_path / "trained.onnx").graph.initializer
    assert w.data_type == TensorProto.FLOAT
    expected = 2 * torch.tensor(numpy_helper.to_array(mixed.graph.initializer[0])).bfloat16()
    np.testing.assert_array_equal(numpy_helper.to_array(w), expected.float())
    assert zero == mixed.graph.initializer[1]


def test_quantization_asks_for_float32(mixed: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match=r"loaded with dtype=torch\.bfloat16"):
        qwrap.prepare(load(mixed, dtype=torch.bfloat16))
