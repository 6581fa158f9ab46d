"""Models of one operator, or of the few that quantizing treats together, at every opset.

``make(CASES["Conv"], opset=13)`` is the float model, and batches for it. The table of cases is in
``operator_cases.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Batch = Mapping[str, np.ndarray]
Array = np.ndarray
NEWEST = 26
"""The newest opset that onnxruntime 1.31 loads."""


@dataclass(frozen=True)
class Case:
    """One model in ONNX's text form, ``T`` standing for the floating type.

    Attributes:
        nodes: by the opset from which the text holds.
        inputs: graph input -> shape, -1 for a dimension without a fixed size.
        weights: name -> array, or a shape to fill with seeded normal values.
        outputs: graph output -> rank.
        until: newest opset.
        domains: other opset imports.
        integers: inputs that hold indices below the bound.
        half: whether float16 kernels exist.
    """

    nodes: str | Mapping[int, str]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, int]
    weights: Mapping[str, tuple[int, ...] | Array] = field(default_factory=dict)
    until: int = 28
    domains: tuple[str, ...] = ()
    integers: Mapping[str, int] = field(default_factory=dict)
    half: bool = True

    @property
    def since(self) -> int:
        return 10 if isinstance(self.nodes, str) else min(self.nodes)

    def text(self, opset: int) -> str:
        if isinstance(self.nodes, str):
            return self.nodes
        return self.nodes[max(since for since in self.nodes if since <= opset)]


@dataclass(frozen=True)
class Made:
    """A float model and what calibrates it."""

    model: ModelProto
    batches: Sequence[Batch]


def make(case: Case, opset: int = 17, half: bool = False, constants: bool = False) -> Made:
    """The case's model and three batches."""
    return Made(make_model(case, opset, half, constants), make_batches(case, half=half))


def make_model(
    case: Case, opset: int = 17, half: bool = False, constants: bool = False
) -> ModelProto:
    """The case's model; its weights are Constant nodes where ``constants`` says so."""
    kind = "float16" if half else "float"
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT64 if name in case.integers else _tensor_type(half),
            [f"{name}_{axis}" if size < 0 else size for axis, size in enumerate(shape)],
        )
        for name, shape in case.inputs.items()
    ]
    domains = "".join(f', "{domain}": 1' for domain in case.domains)
    version = 8 if opset < 19 else 10
    model = onnx.parser.parse_model(
        f'<ir_version: {version}, opset_import: ["": {opset}{domains}]> made () => () '
        f"{{ {case.text(opset).replace('T[', kind + '[')} }}"
    )
    model.graph.input.extend(inputs)
    model.graph.output.extend(
        helper.make_tensor_value_info(
            name, _tensor_type(half), [f"{name}_{axis}" for axis in range(rank)]
        )
        for name, rank in case.outputs.items()
    )
    name_nodes(model.graph)
    _add_weights(model, case, half, constants)
    return model


def _tensor_type(half: bool) -> int:
    return int(TensorProto.FLOAT16 if half else TensorProto.FLOAT)


def _add_weights(model: ModelProto, case: Case, half: bool, constants: bool) -> None:
    rng = np.random.default_rng(5)
    made = []
    for name, value in case.weights.items():
        array = rng.normal(0, 0.3, value) if isinstance(value, tuple) else np.asarray(value)
        if array.dtype == np.float64:  # float32 arrays stay: Resize's scales, for one
            array = array.astype(np.float16 if half else np.float32)
        made.append(numpy_helper.from_array(array, name))
    if not constants:
        model.graph.initializer.extend(made)
        return
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(
        helper.make_node("Constant", [], [tensor.name], name=f"/{tensor.name}", value=tensor)
        for tensor in made
    )
    model.graph.node.extend(old)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name every node after its first output, in bodies too."""
    for node in graph.node:
        node.name = f"/{node.output[0]}"
        if not node.domain:
            node.ClearField("domain")  # as exporters write it; the parser sets it to ""
        for attribute in node.attribute:
            name_nodes(attribute.g)


def make_batches(case: Case, count: int = 3, half: bool = False, seed: int = 0) -> list[Batch]:
    """Seeded normal values; a dimension without a fixed size is 2."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        size = tuple(2 if extent < 0 else extent for extent in shape)
        if name in case.integers:
            return rng.integers(0, case.integers[name], size)
        return rng.normal(0, 1, size).astype(np.float16 if half else np.float32)

    return [{name: draw(name, shape) for name, shape in case.inputs.items()} for _ in range(count)]


def constants_of(model: ModelProto) -> dict[str, Array]:
    """Initializers of the main graph, as arrays."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def node_of(model: ModelProto, op_type: str) -> NodeProto:
    """The one node of that type."""
    (node,) = (node for node in model.graph.node if node.op_type == op_type)
    return node


def attributes_of(node: NodeProto) -> dict[str, object]:
    return {
        a.name: helper.get_attribute_value(a)
        for a in node.attribute
        if a.type != AttributeProto.GRAPH
    }


def open_session(model: ModelProto | str, optimised: bool = True) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: ModelProto | str, batch: Batch, optimised: bool = False) -> list[Array]:
    return [np.asarray(output) for output in open_session(model, optimised).run(None, dict(batch))]


def sqnr(wanted: Sequence[Array] | Array, got: Sequence[Array] | Array) -> float:
    """Signal to quantization noise, in dB, over all floating outputs."""
    pairs = zip(
        wanted if isinstance(wanted, list) else [wanted],
        got if isinstance(got, list) else [got],
        strict=True,
    )
    floats = [
        (np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64))
        for a, b in pairs
        if np.asarray(a).dtype.kind == "f"
    ]
    a, b = (np.concatenate(side) for side in zip(*floats, strict=True))
    noise = float(np.linalg.norm(a - b))
    return float("inf") if noise == 0 else 20 * float(np.log10(np.linalg.norm(a) / noise))
