"""Which tensors calibration looks at."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from qwrap.graph import subgraphs

Values = Mapping[str, ValueInfoProto]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def observed_tensors(
    model: ModelProto, op_types: Collection[str] | None = None
) -> tuple[set[str], dict[str, ValueInfoProto]]:
    """Return the tensors whose ranges quantization may need, and the types of all tensors.

    They are the inputs and outputs, float32 or float16, of nodes of some types, in the bodies of
    If, Loop and Scan too; initialisers and tensors of unknown type are not among them.

    Args:
        model: with declared types.
        op_types: types of nodes; all if None or empty.
    """
    names: set[str] = set()
    types: dict[str, ValueInfoProto] = {}
    _look_into(model.graph, {}, set(op_types or ()), names, types)
    return names, types


def _look_into(
    graph: GraphProto,
    outside: Values,
    op_types: set[str],
    names: set[str],
    types: dict[str, ValueInfoProto],
) -> None:
    """Add what a graph and its bodies hold to ``names`` and ``types``, in place."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {tensor.values.name for tensor in graph.sparse_initializer}
    own = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
    types |= own
    seen = {**outside, **{name: v for name, v in own.items() if name not in constants}}
    for name in constants & seen.keys():
        del seen[name]
    for node in graph.node:
        if not op_types or node.op_type in op_types:
            names |= {n for n in (*node.input, *node.output) if n in seen and _is_float(seen[n])}
        for body in subgraphs(node):
            _look_into(body, seen, op_types, names, types)


def _is_float(value: ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type in _FLOATS


def with_outputs(model: ModelProto, names: Collection[str]) -> ModelProto:
    """Return a copy of ``model`` with tensors of its main graph as outputs, after its own."""
    augmented = ModelProto()
    augmented.CopyFrom(model)
    graph = augmented.graph
    declared = {output.name for output in graph.output}
    for value in (*graph.input, *graph.value_info):
        if value.name in names and value.name not in declared:
            graph.output.append(value)
    return augmented
