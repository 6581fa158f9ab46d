"""The oracle of the com.microsoft tests: a model of one node, run by onnxruntime as it stands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import qwrap.backend

Arrays = Sequence[np.ndarray | None]


def one_node_model(
    op_type: str,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    outputs: Sequence[int],
    constants: Sequence[int],
    domain: str,
    opset: int,
) -> onnx.ModelProto:
    """``outputs`` are the indices of those the node names; ``constants`` those of weights."""
    names = ["" if a is None else f"input_{i}" for i, a in enumerate(inputs)]
    results = [f"output_{i}" if i in outputs else "" for i in range(max(outputs) + 1)]
    declared = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for i, (n, a) in enumerate(zip(names, inputs, strict=True))
        if a is not None and i not in constants
    ]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, results, "node", domain=domain, **attributes)],
        "one_node",
        declared,
        [onnx.ValueInfoProto(name=name) for name in results if name],
        [numpy_helper.from_array(inputs[i], names[i]) for i in constants],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def session_of(model: onnx.ModelProto, optimized: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


ELEMENT_TYPES = {
    "float": onnx.TensorProto.FLOAT,
    "double": onnx.TensorProto.DOUBLE,
    **{name.lower(): value for name, value in onnx.TensorProto.DataType.items()},
}


def computed_by_qwrap(model: onnx.ModelProto, feed: list[np.ndarray]) -> list[np.ndarray]:
    return list(qwrap.backend.prepare(model).run(feed))


def assert_matches_oracle(
    op_type: str,
    inputs: Arrays,
    attributes: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[int] = (0,),
    constants: Sequence[int] = (),
    domain: str = "com.microsoft",
    opset: int = 21,
    rtol: float = 0.0,
    atol: float = 0.0,
    expected: Sequence[np.ndarray] | None = None,
    types: Mapping[int, type] | None = None,
) -> None:
    """Compare shapes, types and values of all outputs, with onnxruntime or with ``expected``.

    ``types`` says that of outputs for which onnxruntime cannot infer it.
    """
    model = one_node_model(op_type, inputs, attributes or {}, outputs, constants, domain, opset)
    for index, kind in (types or {}).items():
        value = model.graph.output[list(outputs).index(index)]
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    feed = [a for i, a in enumerate(inputs) if a is not None and i not in constants]
    if expected is None:
        session = session_of(model)
        names = [value.name for value in session.get_inputs()]
        expected = session.run(None, dict(zip(names, feed, strict=True)))
        for value, found in zip(model.graph.output, session.get_outputs(), strict=True):
            kind = ELEMENT_TYPES[found.type.removeprefix("tensor(").removesuffix(")")]
            value.type.tensor_type.elem_type = kind
    else:
        for value, array in zip(model.graph.output, expected, strict=True):
            value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    got = computed_by_qwrap(model, feed)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(
            ours.astype(np.float64), theirs.astype(np.float64), rtol=rtol, atol=atol
        )


def run_onnxruntime(
    op_type: str,
    inputs: Arrays,
    attributes: Mapping[str, Any],
    outputs: Sequence[int] = (0,),
    domain: str = "com.microsoft",
    opset: int = 21,
) -> list[np.ndarray]:
    session = session_of(one_node_model(op_type, inputs, attributes, outputs, (), domain, opset))
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (a for a in inputs if a is not None), strict=True)))


@pytest.fixture
def oracle() -> Callable[..., list[np.ndarray]]:
    return run_onnxruntime


@pytest.fixture
def check() -> Callable[..., None]:
    return assert_matches_oracle
