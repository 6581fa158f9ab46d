"""The oracle of the operator tests: a model of one node, run by onnxruntime."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qwrap import backend, ops

Arrays = Sequence[np.ndarray | None]


def one_node_model(
    op_type: str,
    opset: int,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    outputs: int,
    domain: str = "",
) -> onnx.ModelProto:
    names = ["" if a is None else f"input_{i}" for i, a in enumerate(inputs)]
    results = [f"output_{i}" for i in range(outputs)]
    values = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in attributes.items()
    }
    graph = helper.make_graph(
        [helper.make_node(op_type, names, results, domain=domain, **values)],
        "one_node",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, inputs, strict=True)
            if a is not None
        ],
        [onnx.ValueInfoProto(name=name) for name in results],
    )
    imports = [helper.make_opsetid(domain, opset)]
    imports += [helper.make_opsetid("", 17)] if domain else []
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def expected(
    op_type: str,
    opset: int,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    outputs: int,
    domain: str = "",
) -> list[np.ndarray]:
    """What the oracle returns for one node."""
    model = one_node_model(op_type, opset, inputs, attributes, outputs, domain)
    return run_oracle(model, {f"input_{i}": a for i, a in enumerate(inputs) if a is not None})


def run_oracle(model: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What onnxruntime returns; where it has no kernel, the reference implementation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except (
        onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
        onnxruntime.capi.onnxruntime_pybind11_state.Fail,
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    ):
        return ReferenceEvaluator(model).run(None, feed)
    return session.run(None, feed)


def arguments(
    operator: ops.Operator, inputs: Arrays, literals: bool
) -> list[torch.Tensor | float | list[Any] | None]:
    """The inputs as the executor hands them over, constants as numbers if ``literals``."""
    arguments: list[Any] = []
    for index, array in enumerate(inputs):
        if array is None:
            arguments.append(None)
        elif operator.wants_host(index) or (
            literals and index in operator.literal and not array.ndim
        ):
            arguments.append(array.tolist())
        else:
            arguments.append(as_value(array))
    return arguments


def as_value(array: np.ndarray) -> torch.Tensor | np.ndarray:
    return array if array.dtype == object else torch.from_numpy(array)


def computed(
    op_type: str,
    opset: int,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    outputs: int,
    literals: bool = False,
    domain: str = "",
) -> list[np.ndarray]:
    operator = ops.find(domain, op_type, opset)
    assert operator is not None, f"{op_type} of opset {opset} is not registered"
    keywords = operator.bind({
        name: as_value(value) if isinstance(value, np.ndarray) else value
        for name, value in attributes.items()
    })
    if operator.wants_output_count:
        keywords["output_count"] = outputs
    if operator.wants_dtype:
        keywords["dtype"] = torch.from_numpy(inputs[0]).dtype
    result = operator.function(*arguments(operator, inputs, literals), **keywords)
    assert operator.returns_tuple == isinstance(result, tuple)
    results = result if isinstance(result, tuple) else (result,)
    return [r if isinstance(r, np.ndarray) else r.numpy() for r in results]


def assert_matches_oracle(
    op_type: str,
    opset: int,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    outputs: int = 1,
    rtol: float = 0.0,
    atol: float = 0.0,
    domain: str = "",
) -> None:
    """Compare shapes, types and values of all outputs."""
    wanted = expected(op_type, opset, inputs, attributes, outputs, domain)
    for literals in (False, True):
        got = computed(op_type, opset, inputs, attributes, outputs, literals, domain)
        assert len(got) >= outputs
        for ours, theirs in zip(got, wanted, strict=False):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            if ours.dtype == object:
                assert ours.tolist() == theirs.tolist()
            else:
                np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


@pytest.fixture
def check() -> Callable[..., None]:
    return assert_matches_oracle


def assert_gradients_are_finite_differences(
    op_type: str,
    opset: int,
    tensors: Sequence[torch.Tensor],
    constants: Sequence[Any] = (),
    domain: str = "",
    **attributes: Any,
) -> None:
    """Compare autograd with central differences in float64 for all ``tensors``."""
    operator = ops.find(domain, op_type, opset)
    assert operator is not None

    def of_tensors(*inputs: torch.Tensor) -> Any:
        results = operator.function(*inputs, *constants, **attributes)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r.dtype.is_floating_point)

    leaves = tuple(t.detach().double().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(of_tensors, leaves)


def assert_gradients_match(
    op_type: str,
    opset: int,
    shapes: Sequence[tuple[int, ...] | None],
    constants: Sequence[Any] = (),
    attributes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Compare autograd with central differences in float64.

    The inputs are random tensors of ``shapes``, None for one that is left out, then ``constants``.
    """
    operator = ops.find("", op_type, opset)
    assert operator is not None
    generator = torch.Generator().manual_seed(0)
    tensors = [
        None if s is None else torch.randn(s, dtype=torch.float64, generator=generator)
        for s in shapes
    ]
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def compute(*given: torch.Tensor) -> Any:
        rest = list(given)
        inputs = [None if t is None else rest.pop(0) for t in tensors]
        return operator.function(*inputs, *constants, **attributes)

    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


@pytest.fixture
def check_gradients() -> Callable[..., None]:
    return assert_gradients_are_finite_differences


@pytest.fixture
def check_random_gradients() -> Callable[..., None]:
    return assert_gradients_match


def assert_compiles(
    op_type: str, opset: int, inputs: Sequence[Any], attributes: Mapping[str, Any]
) -> None:
    """Trace into one graph, and compare what it computes with the function called directly."""
    operator = ops.find("", op_type, opset)
    assert operator is not None
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True, backend="eager")
    wanted = operator.function(*inputs, **attributes)
    torch.testing.assert_close(compiled(*inputs, **attributes), wanted, rtol=0, atol=0)


@pytest.fixture
def check_compiles() -> Callable[..., None]:
    return assert_compiles


def assert_model_matches_oracle(
    nodes: Sequence[onnx.NodeProto],
    feed: Mapping[str, np.ndarray | onnx.TensorProto],
    outputs: Mapping[str, int],
    opset: int,
) -> None:
    """Compare a graph, exactly, by its outputs (name -> type); a TensorProto is an initialiser."""
    arrays = {name: a for name, a in feed.items() if not isinstance(a, onnx.TensorProto)}
    graph = helper.make_graph(
        nodes,
        "types",
        [
            helper.make_tensor_value_info(
                name,
                onnx.TensorProto.STRING
                if a.dtype == object
                else helper.np_dtype_to_tensor_dtype(a.dtype),
                a.shape,
            )
            for name, a in arrays.items()
        ],
        [helper.make_tensor_value_info(name, type_, None) for name, type_ in outputs.items()],
        [t for t in feed.values() if isinstance(t, onnx.TensorProto)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    wanted = run_oracle(model, arrays)
    got = backend.prepare(model).run(list(arrays.values()))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def check_model() -> Callable[..., None]:
    return assert_model_matches_oracle
