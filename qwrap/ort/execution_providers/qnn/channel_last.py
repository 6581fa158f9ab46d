"""Graph inputs and outputs with their channels last."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from qwrap.ort.errors import QuantizationError
from qwrap.ort.graphs.scopes import made_names, rename_reads

_SMALLEST_RANK = 3


class InputOutputNameMap:
    """Names for the tensors inside that stand for graph inputs and outputs.

    Args:
        orig_tensor_names: names that are taken.
        orig_graph_inputs: graph inputs by name.
        orig_graph_outputs: graph outputs by name.

    Attributes:
        updated_io_names: graph input or output -> the name inside.
        new_value_infos: types of the tensors inside.
    """

    def __init__(
        self,
        orig_tensor_names: Collection[str],
        orig_graph_inputs: Mapping[str, onnx.ValueInfoProto],
        orig_graph_outputs: Mapping[str, onnx.ValueInfoProto],
    ) -> None:
        self.orig_tensor_names = orig_tensor_names
        self.orig_graph_inputs = orig_graph_inputs
        self.orig_graph_outputs = orig_graph_outputs
        self.updated_io_names: dict[str, str] = {}
        self.new_value_infos: list[onnx.ValueInfoProto] = []

    def get_new_name(self, orig_name: str) -> str:
        """Return the name inside, ``<name>_channel_first_<number>`` with the first free number."""
        if orig_name not in self.updated_io_names:
            prefix = f"{orig_name}_channel_first_"
            ends = {n.removeprefix(prefix) for n in self.orig_tensor_names if n.startswith(prefix)}
            number = max((int(end) for end in ends if end.isdecimal()), default=-1) + 1
            inner = onnx.ValueInfoProto()
            inputs, outputs = self.orig_graph_inputs, self.orig_graph_outputs
            inner.CopyFrom(inputs[orig_name] if orig_name in inputs else outputs[orig_name])
            inner.name = f"{prefix}{number}"
            self.new_value_infos.append(inner)
            self.updated_io_names[orig_name] = inner.name
        return self.updated_io_names[orig_name]


def update_io_to_channel_last(
    model: onnx.ModelProto,
    inputs_to_update: Iterable[str] | None,
    outputs_to_update: Iterable[str] | None,
    transpose_node_name_prefix: str = "Transpose_channel_",
    transpose_node_name_start_suffix: int = 0,
) -> None:
    """Let graph inputs and outputs be [N, D1, ..., Dn, C] instead of [N, C, D1, ..., Dn], in place.

    Each gets a Transpose; inside, the tensor is ``<name>_channel_first_<number>``. The Transpose
    nodes stand last, so the nodes have to be sorted.

    Args:
        model: changed in place.
        inputs_to_update: names of graph inputs.
        outputs_to_update: names of graph outputs.
        transpose_node_name_prefix: names of the nodes begin with it.
        transpose_node_name_start_suffix: number of the first of them.

    Raises:
        QuantizationError: there is no such input or output, or it has less than three dimensions;
            the model is unchanged (a ``ValueError``).
    """
    graph = model.graph
    inputs = _found(graph.input, inputs_to_update, "input")
    outputs = _found(graph.output, outputs_to_update, "output")
    names_inside = InputOutputNameMap(
        made_names(graph), {v.name: v for v in inputs}, {v.name: v for v in outputs}
    )
    number = transpose_node_name_start_suffix
    for value, is_input in [*((v, True) for v in inputs), *((v, False) for v in outputs)]:
        inner = names_inside.get_new_name(value.name)
        _rename(graph, value.name, inner)
        rank = len(value.type.tensor_type.shape.dim)
        order = [0, *range(2, rank), 1]
        before = names_inside.new_value_infos[-1].type.tensor_type.shape.dim
        dims = [before[axis] for axis in order]
        del value.type.tensor_type.shape.dim[:]
        value.type.tensor_type.shape.dim.extend(dims)
        names = (value.name, inner) if is_input else (inner, value.name)
        graph.node.append(
            helper.make_node(
                "Transpose",
                [names[0]],
                [names[1]],
                f"{transpose_node_name_prefix}{number}",
                perm=[0, rank - 1, *range(1, rank - 1)] if is_input else order,
            )
        )
        number += 1
    graph.value_info.extend(names_inside.new_value_infos)


def _found(values: Sequence[Any], names: Iterable[str] | None, role: str) -> list[Any]:
    known: Mapping[str, Any] = {value.name: value for value in values}
    found = []
    for name in dict.fromkeys(names or ()):
        if name not in known:
            raise QuantizationError(f"{name} is not a graph {role}; it has {sorted(known)}")
        kind = known[name].type
        if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
            raise QuantizationError(f"Expected {role} {name} to have a tensor_type with a shape")
        if len(kind.tensor_type.shape.dim) < _SMALLEST_RANK:
            raise QuantizationError(f"Expected {role} {name} to be of rank >= {_SMALLEST_RANK}")
        found.append(known[name])
    return found


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        rename_reads(node, old, new)
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new
