"""The oracle of the operator tests: a model of one node, run by onnxruntime."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qwrap import ops

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
    """What onnxruntime returns; where it has no kernel, the reference implementation."""
    model = one_node_model(op_type, opset, inputs, attributes, outputs, domain)
    feed = {f"input_{i}": a for i, a in enumerate(inputs) if a is not None}
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
