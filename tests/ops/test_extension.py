"""Operators of the user's own, and nodes left to onnxruntime."""

import copy
import pickle
from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

import qwrap
from qwrap.errors import ConfigError, GradientWarning, UnsupportedOpError
from qwrap.ops import registry

X = torch.tensor([[1.0, -2.0, 3.0]])


@pytest.fixture(autouse=True)
def _restore_the_registry() -> Iterator[None]:
    before = dict(registry._OPERATORS), dict(registry._KEYS)
    yield
    for table, saved in zip((registry._OPERATORS, registry._KEYS), before, strict=True):
        table.clear()
        table.update(saved)


def model(
    op_type: str,
    domain: str,
    outputs: int = 1,
    kinds: tuple[int, ...] = (TensorProto.FLOAT,),
    **attributes: object,
) -> onnx.ModelProto:
    inputs = [f"x{i}" for i in range(len(kinds))]
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, results, "n", domain=domain, **attributes)],
        "g",
        [helper.make_tensor_value_info(n, k, None) for n, k in zip(inputs, kinds, strict=True)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_a_registered_function_computes_its_operator_and_is_trained_through() -> None:
    @qwrap.register_op("com.example", "Cube")
    def cube(x: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * x**3

    x = X.clone().requires_grad_()
    y = qwrap.load(model("Cube", "com.example", factor=2.0))(x)
    assert torch.equal(y, 2 * X**3)
    y.sum().backward()
    assert torch.equal(x.grad, 6 * X**2)


def test_a_registered_function_may_have_several_outputs() -> None:
    @qwrap.register_op("com.example", "Parts", [1, 3])
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clamp(min=0), x.clamp(max=0)

    wrapped = qwrap.load(model("Parts", "com.example", outputs=2))
    positive, negative = wrapped(X)
    assert torch.equal(positive + negative, X)
    assert torch.equal(qwrap.load(model("Parts", "com.example"))(X), positive)
    assert torch.equal(pickle.loads(pickle.dumps(wrapped))(X)[1], negative)


def test_what_is_there_is_only_replaced_when_asked() -> None:
    with pytest.raises(ConfigError, match=r"ai\.onnx::Relu has revisions \[14\] already"):
        qwrap.register_op("ai.onnx", "Relu", 14)(torch.abs)
    qwrap.register_op("ai.onnx", "Relu", 14, replace=True)(torch.abs)
    proto = model("Relu", "")
    del proto.opset_import[1]
    assert torch.equal(qwrap.load(proto)(X), X.abs())


def test_unpickling_without_the_function_says_what_to_register() -> None:
    qwrap.register_op("com.example", "Same")(torch.clone)
    text = pickle.dumps(qwrap.load(model("Same", "com.example")))
    del registry._OPERATORS["com.example", "Same", 1]
    with pytest.raises(UnsupportedOpError, match=r"com\.example::Same.*register_op"):
        pickle.loads(text)


# --- onnxruntime ---------------------------------------------------------------------------------

KINDS = (TensorProto.INT64, TensorProto.FLOAT)


def ngram() -> tuple[onnx.ModelProto, list[Tensor]]:
    """An operator that has a kernel in onnxruntime and, from here on, no torch function."""
    registry._OPERATORS.pop(("com.microsoft", "NGramRepeatBlock", 1), None)
    proto = model("NGramRepeatBlock", "com.microsoft", kinds=KINDS, ngram_size=1)
    return proto, [torch.tensor([[0, 2]]), X]


def test_onnxruntime_computes_what_nothing_else_does_and_says_that_gradients_stop() -> None:
    proto, inputs = ngram()
    with pytest.warns(GradientWarning, match=r"nodes \['n'\] are computed by onnxruntime"):
        wrapped = qwrap.load(proto)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, {f"x{i}": t.numpy() for i, t in enumerate(inputs)})
    scores = inputs[1].clone().requires_grad_()
    result = wrapped(inputs[0], scores)
    np.testing.assert_array_equal(result.numpy(), expected)
    assert not result.requires_grad
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(other(*inputs), result)


def test_what_onnxruntime_does_not_know_either_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedOpError, match=r"'n'.*com\.example::Nothing.*onnxruntime: .*"):
        qwrap.load(model("Nothing", "com.example"))


def test_a_library_that_is_none_is_named() -> None:
    with pytest.raises(UnsupportedOpError, match=r"missing\.so"):
        qwrap.load(model("Nothing", "com.example"), custom_ops=["missing.so"])


def test_a_library_of_operators_is_used() -> None:
    extensions = pytest.importorskip("onnxruntime_extensions", reason="brings such a library")
    library = extensions.get_library_path()
    proto = model("Inverse", "ai.onnx.contrib")
    with pytest.warns(GradientWarning):
        wrapped = qwrap.load(proto, custom_ops=[library])
    matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    assert torch.equal(wrapped(matrix), torch.tensor([[0.5, 0.0], [0.0, 0.25]]))
