"""A QDQ file: which tensors it quantizes, and a copy that gives their codes away."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.dtypes import quant_type
from qwrap.errors import ModelError
from qwrap.graph.index import OnnxGraph, bodies, walk_nodes
from qwrap.graph.load import read_model
from qwrap.graph.nodes import QUANTIZED, QUANTIZED_AS
from qwrap.model.points import Point
from qwrap.verify.conversions import (
    conversions_of,
    dequantized,
    origin_of,
    points_of,
    quantizes,
)
from qwrap.verify.report import SkippedTensor
from qwrap.verify.session import Array, Mode, Session

# Those that onnxruntime hands over as arrays, and those that have to become floats first.
CODES = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)
CONVERTED = (
    ir.DataType.UINT4,
    ir.DataType.INT4,
    ir.DataType.UINT2,
    ir.DataType.INT2,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """A float tensor that the file quantizes.

    Attributes:
        name: its key in the float model; of what is converted for some readers, the key of the
            tensor followed by "_convert".
        codes: name of the QuantizeLinear's output, or of the call of a function that dequantizes
            too, whose values then take the place of codes.
        returned: name of the copy's output that has them, as floats where numpy lacks the type.
        domain: of the QuantizeLinear.
        dequantized: names of the DequantizeLinear outputs that stand for it from there on.
        dtype: type of the codes.
        scale: float32, one element or one per index of ``axis``.
        zero_point: float32, of the shape of ``scale``.
        axis: what a scale of several elements runs along; None for functions, whose scales
            broadcast.
        points: where the float model has it, if it is converted for some readers; else empty.
    """

    name: str
    codes: str
    returned: str
    domain: str
    dequantized: tuple[str, ...]
    dtype: str
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    points: tuple[Point, ...] = ()

    def along_axis(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as they broadcast against a tensor of ``rank``."""
        if self.axis is None:
            return self.scale, self.zero_point
        shape = [1] * rank
        if self.scale.numel() > 1:
            shape[self.axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)

    def dequantize(self, codes: Array) -> Tensor:
        """Return the float32 values that ``codes`` stand for."""
        if self.axis is None:
            return torch.from_numpy(codes.astype("float32"))
        scale, zero_point = self.along_axis(codes.ndim)
        # float32 holds every code of up to 16 bits
        return torch.from_numpy(codes.astype("float32")).sub_(zero_point).mul_(scale)

    def numbers(self, codes: Array) -> Tensor:
        """Return ``codes`` as float32 numbers, values of functions in units of the scale."""
        numbers = torch.from_numpy(codes.astype("float32"))  # holds every code of up to 16 bits
        return numbers.div_(self.scale) if self.axis is None else numbers

    def position(self, steps: Tensor) -> Tensor:
        """Return how many numbers of the type lie below what ``steps`` are rounded to.

        Where a value cannot be held it is counted on, as if the last distance between two numbers
        went on. For integers that is their own value, and for functions what they are given, as
        nobody knows what they round to.
        """
        if self.axis is None:
            return steps
        levels = quant_type(self.dtype).levels
        if levels is None:
            return steps.round()
        numbers = torch.tensor(levels, dtype=torch.float32)
        last = numbers[-1] - numbers[-2]
        beyond = (steps.abs() - numbers[-1]).clamp(min=0).div(last).round() * steps.sign()
        middles = numbers[:-1] + (numbers[1:] - numbers[:-1]) / 2
        found = torch.bucketize(steps, middles).to(torch.float32) + beyond
        return torch.where(steps.isnan(), steps, found)


class QdqFile:
    """An ONNX file with QuantizeLinear nodes, or calls of functions, read for comparison.

    Attributes:
        path: where it is.
        outputs: names of its graph outputs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the file.

        Raises:
            ModelError: it is missing, no ONNX model, cut off, or lacks external data.
        """
        self.path = Path(path)
        self._model = read_model(self.path)
        self.inputs = [v.name or "" for v in self._model.graph.inputs if not v.is_initializer()]
        self.outputs = [v.name or "" for v in self._model.graph.outputs]

    @property
    def casts_to_half(self) -> bool:
        """Whether a part of the file computes in float16, and another one does not."""
        casts = (node for node in walk_nodes(self._model.graph) if node.op_type == "Cast")
        targets = (node.attributes["to"] for node in casts if not node.domain)
        return any(to.value in (ir.DataType.FLOAT16, "FLOAT16") for to in targets)

    def check_interface(self, graph: OnnxGraph, whose: str) -> None:
        """Refuse a file whose graph inputs or outputs are not those of ``graph``.

        Raises:
            ModelError: with both lists.
        """
        for kind, mine, theirs in (
            ("inputs", self.inputs, [v.name for v in graph.inputs]),
            ("outputs", self.outputs, [v.name for v in graph.outputs]),
        ):
            if mine != theirs:
                raise ModelError(
                    f"{self.path}: graph {kind} {mine} are not those of {whose}, {theirs}; give "
                    "the file that was made from it"
                )

    def tensors(
        self, graph: OnnxGraph | None
    ) -> tuple[tuple[QuantizedTensor, ...], tuple[SkippedTensor, ...]]:
        """Return what can be compared, and what cannot.

        Args:
            graph: of the float model whose tensors are wanted, in its topological order; None
                takes every quantized tensor under its name in the file.
        """
        names = None if graph is None else _top_level(graph)
        found, skipped = [], []
        for node, nested in _quantize_nodes(self._model):
            first = node if graph is None else origin_of(node) or node
            matched = nested or _match(node, names, first)
            if isinstance(matched, QuantizedTensor) and graph is not None and first is not node:
                matched = self._as_converted(matched, node, first, graph)
            if isinstance(matched, str):
                skipped.append(SkippedTensor(name=_name(node.inputs[0]), reason=matched))
            else:
                found.append(matched)
        if graph is not None:
            order = {key: i for i, key in enumerate(graph.values)}
            found.sort(key=lambda tensor: order[tensor.name])
            found = [_renamed(tensor, found) for tensor in found]
        return tuple(found), tuple(skipped)

    def _as_converted(
        self, tensor: QuantizedTensor, node: ir.Node, first: ir.Node, graph: OnnxGraph
    ) -> QuantizedTensor | str:
        """Return what ``node`` makes of what ``first`` quantized, or why it cannot be compared."""
        if origin_of(first) is not None:
            return "is converted twice"
        points = points_of(node, graph.nodes, self.outputs)
        if not points:
            return "is converted for nodes that the float model does not have"
        return replace(tensor, points=points)

    def session(self, mode: Mode) -> Session:
        """Open the file as it is."""
        return Session(self.path, mode, self.path.parent, str(self.path))

    def session_with_codes(self, mode: Mode, tensors: tuple[QuantizedTensor, ...]) -> Session:
        """Open ``copy_with_codes`` of the file."""
        return Session(self.copy_with_codes(tensors), mode, self.path.parent, str(self.path))

    def copy_with_codes(self, tensors: tuple[QuantizedTensor, ...]) -> bytes:
        """Return the serialised file with the codes of ``tensors`` as further graph outputs.

        onnxruntime fuses that copy as it does the file: a QuantizeLinear that feeds a graph output
        stays the end of the group of nodes that becomes an integer kernel.
        """
        copy = self._model.clone()
        values = {v.name: v for node in copy.graph for v in node.outputs}
        present = {v.name for v in copy.graph.outputs}
        for tensor in {tensor.returned: tensor for tensor in tensors}.values():
            if tensor.returned in present:
                continue
            value = values[tensor.codes]
            if tensor.returned != tensor.codes:
                value = _as_floats(copy.graph, value, tensor)
            copy.graph.outputs.append(value)
        data: bytes = ir.to_proto(copy).SerializeToString()
        return data


def _as_floats(graph: ir.Graph, codes: ir.Value, tensor: QuantizedTensor) -> ir.Value:
    """Return the numbers that codes are, unscaled, as float32."""
    one = ir.tensor(np.array(1, dtype=np.float32), name=f"{tensor.returned}_scale")
    scale = ir.Value(
        name=one.name, type=ir.TensorType(one.dtype), shape=ir.Shape(()), const_value=one
    )
    graph.register_initializer(scale)
    node = ir.Node(tensor.domain, "DequantizeLinear", [codes, scale], num_outputs=1)
    producer, result = codes.producer(), node.outputs[0]
    assert producer is not None
    graph.insert_after(producer, node)
    result.name, result.type = tensor.returned, ir.TensorType(ir.DataType.FLOAT)
    return result


def _quantize_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Yield every node that quantizes, with the reason why its output cannot be a graph output."""
    for node in model.graph:
        if quantizes(node):
            yield node, ""
        for name, body in bodies(node):
            where = f"inside {name} of node {node.name or node.outputs[0].name!r}"
            yield from ((n, where) for n in walk_nodes(body) if quantizes(n))
    for function in model.functions.values():
        where = f"inside function {function.name!r}"
        for node in function:
            if quantizes(node):
                yield node, where


def _renamed(tensor: QuantizedTensor, among: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return a converted tensor with a name of its own, as the plan's."""
    if not tensor.points:
        return tensor
    kinds = {t.dtype for t in among if t.points and t.name == tensor.name}
    kind = f"_{tensor.dtype}" if len(kinds) > 1 else ""
    return replace(tensor, name=f"{tensor.name}_convert{kind}")


def _top_level(graph: OnnxGraph) -> dict[str, str]:
    """Return name -> key of the values of the outermost graph that come out of a node or a batch.

    A value of a body may bear the same name; then their keys differ.
    """
    computed = [*graph.inputs, *(v for node in graph.model.graph for v in node.outputs)]
    return {v.name: graph.key(v) for v in computed if v.name}


def _match(node: ir.Node, names: dict[str, str] | None, first: ir.Node) -> QuantizedTensor | str:
    """Return what ``node`` quantizes, or why that cannot be compared.

    Args:
        node: rounds to the numbers of a type.
        names: of the float model's tensors -> their keys.
        first: what quantized the tensor before it was converted, or ``node``.
    """
    data = node.inputs[0]
    if data is None or ir.convenience.get_const_tensor(data) is not None:
        return "is a constant"
    if QUANTIZED in node.metadata_props:
        return _match_call(node, names, first)
    name = _name(data) if names is None else _key_of(first, names)
    if name is None:
        return "is no tensor of the float model"
    parameters = _parameters(node)
    if isinstance(parameters, str):
        return parameters
    scale, zero_point, dtype = parameters
    return QuantizedTensor(
        name=name,
        codes=_name(node.outputs[0]),
        returned=_name(node.outputs[0]) + ("" if dtype in CODES else "_as_floats"),
        domain=node.domain,
        dequantized=tuple(map(_name, dequantized(node))),
        dtype=dtype.name.lower(),
        scale=scale,
        zero_point=zero_point,
        axis=_integer(node, "axis", 1),
    )


def _key_of(first: ir.Node, names: dict[str, str]) -> str | None:
    """Return the key of the tensor that ``first`` quantizes, None if the float model has it not.

    A quantized graph output has its name from the DequantizeLinear that now makes it, or from that
    of what it was converted to, and so has what only some readers of a tensor read; a Max with
    nothing, -inf, keeps onnxruntime from removing what is in front of it.
    """
    if QUANTIZED in first.metadata_props:
        return names.get(first.metadata_props[QUANTIZED])
    data = first.inputs[0]
    front = None if data is None else data.producer()
    passed = front.inputs[0] if front is not None and front.op_type == "Max" else None
    behind = [value for node in (first, *conversions_of(first)) for value in dequantized(node)]
    candidates = map(_name, (*behind, data, passed))
    return next((names[name] for name in candidates if name in names), None)


def _match_call(
    node: ir.Node, names: dict[str, str] | None, first: ir.Node
) -> QuantizedTensor | str:
    """Return what the call of a function quantizes, or why that cannot be compared."""
    name = node.metadata_props[QUANTIZED]
    if node.graph is not None and name in node.graph.initializers:
        return "is a constant"
    key = name if names is None else _key_of(first, names)
    if key is None:
        return "is no tensor of the float model"
    scale, result = _constant(node, 1), node.outputs[0]
    if scale is None:
        return "its scale is computed while the model runs"
    if result.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "onnxruntime does not return values of its type to Python"
    scales = torch.from_numpy(scale.numpy().astype("float32"))
    return QuantizedTensor(
        name=key,
        codes=_name(result),
        returned=_name(result),
        domain=node.domain,
        dequantized=(_name(result),),
        dtype=node.metadata_props.get(QUANTIZED_AS, node.op_type),
        scale=scales,
        zero_point=torch.zeros_like(scales),
        axis=None,
    )


def _parameters(node: ir.Node) -> tuple[Tensor, Tensor, ir.DataType] | str:
    """Return scale, zero point and type of the codes, or why they are not at hand."""
    scale = _constant(node, 1)
    if scale is None:
        return "its scale is computed while the model runs"
    zero_point = _constant(node, 2)
    has_zero_point = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_zero_point and zero_point is None:
        return "its zero point is computed while the model runs"
    stated = _integer(node, "output_dtype", 0) or ir.DataType.UINT8.value
    dtype = ir.DataType(stated) if zero_point is None else zero_point.dtype
    if dtype not in (*CODES, *CONVERTED):
        return f"its codes are {dtype.name.lower()}"
    if _integer(node, "block_size", 0):
        return "it has a scale for each block"
    scales = torch.from_numpy(scale.numpy().astype("float32")).reshape(-1)
    if zero_point is None:
        return scales, torch.zeros_like(scales), dtype
    return scales, torch.from_numpy(zero_point.numpy().astype("float32")).reshape(-1), dtype


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None else ir.convenience.get_const_tensor(value)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
