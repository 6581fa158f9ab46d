"""Derivatives: autograd through a loaded model against central differences in float64.

A whole Jacobian is not needed to tell a wrong one: for random u and v, ``v . J u`` from autograd is
compared with the slope of ``v . f`` along u.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import qwrap
from qwrap import ops
from qwrap.model.tensors import to_array, to_value

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
TYPES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")
Function = Callable[[Sequence[Any]], list[Any]]

# Error of the central difference: h^2 f''' / 6 + 1e-16 f / h; with values near 1, below 1e-9.
STEP = 1e-5
TOLERANCE = 1e-6
ATTEMPTS = 4


class NotSmoothError(Exception):
    """Central differences of two widths disagree: a kink, or a function rounded to float32."""


def with_floats(model: onnx.ModelProto, to: int) -> onnx.ModelProto:
    """A copy that has the element type ``to`` wherever ``model`` has a float type."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for function in model.functions:
        for node in function.node:
            convert_node(node, to)
    convert_graph(model.graph, to)
    return model


def convert_graph(graph: onnx.GraphProto, to: int) -> None:
    """Change the float types of a graph, in place."""
    for tensor in graph.initializer:
        convert_tensor(tensor, to)
    for value in (*graph.input, *graph.output, *graph.value_info):
        convert_type(value.type, to)
    for node in graph.node:
        convert_node(node, to)


def convert_type(declared: onnx.TypeProto, to: int) -> None:
    """Change a declared type if it is of floats, in place."""
    kind = declared.WhichOneof("value")
    if kind == "sequence_type":
        convert_type(declared.sequence_type.elem_type, to)
    elif kind == "optional_type":
        convert_type(declared.optional_type.elem_type, to)
    elif kind == "tensor_type" and declared.tensor_type.elem_type in FLOATS:
        declared.tensor_type.elem_type = to


def convert_tensor(tensor: onnx.TensorProto, to: int) -> None:
    """Change a stored tensor if it is of floats, in place."""
    if tensor.data_type in FLOATS:
        array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(to))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def convert_node(node: onnx.NodeProto, to: int) -> None:
    """Change the float constants and wanted types of a node, in place."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            convert_tensor(attribute.t, to)
        convert_graph(attribute.g, to)
        if attribute.name in TYPES and attribute.i in FLOATS:
            attribute.i = to
        if attribute.name == "to" and attribute.s in (b"FLOAT", b"FLOAT16", b"DOUBLE"):  # Cast-1
            attribute.s = TensorProto.DataType.Name(to).encode()
    floats = [a for a in node.attribute if a.name in ("value_float", "value_floats")]
    for attribute in floats:
        values = np.array(attribute.f if attribute.name == "value_float" else attribute.floats)
        values = values.astype(helper.tensor_dtype_to_np_dtype(to))
        node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(values)))


def value_in_double(value: Any) -> Any:
    """A float array, or a list of them, as float64; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [value_in_double(item) for item in value]
    return value.astype(np.float64) if is_float(value) else value


def is_float(value: Any) -> bool:
    name = getattr(getattr(value, "dtype", None), "name", "")
    return name in ("float16", "float32", "float64", "bfloat16")


def leaves(value: Any) -> list[Any]:
    """The arrays in nested lists."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def steering(model: onnx.ModelProto) -> set[str]:
    """Graph inputs that are only read as Python numbers: they steer shapes, or count."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    numbers, tensors = set(), set()
    for node in model.graph.node:
        operator = ops.find(node.domain, node.op_type, opsets[node.domain])
        for i, name in enumerate(node.input):
            is_number = operator is not None and operator.wants_host(i)
            (numbers if is_number else tensors).add(name)
    return numbers - tensors


class Point:
    """Inputs of a model and one direction in which those of floats move."""

    def __init__(self, inputs: Sequence[Any], moving: Sequence[bool], rng: np.random.Generator):
        self.inputs = [value_in_double(value) for value in inputs]
        self._directions = [
            self._draw(value, rng) if moves else None
            for value, moves in zip(self.inputs, moving, strict=True)
        ]

    def _draw(self, value: Any, rng: np.random.Generator) -> Any:
        if isinstance(value, list):
            return [self._draw(item, rng) for item in value]
        return rng.normal(size=value.shape) if is_float(value) else None

    def jittered(self, rng: np.random.Generator) -> Point:
        """Another point near by."""
        inputs = [
            nudge(value, direction, rng)
            for value, direction in zip(self.inputs, self._directions, strict=True)
        ]
        return Point(inputs, [d is not None for d in self._directions], rng)

    def moved(self, step: float) -> list[Any]:
        return [move(*pair, step) for pair in zip(self.inputs, self._directions, strict=True)]

    def slope(self, gradients: Sequence[Any]) -> float:
        """The product of gradients, as nested as the inputs, and the direction."""
        pairs = zip(leaves(list(gradients)), leaves(self._directions), strict=True)
        return sum(float((g * d).sum()) for g, d in pairs if g is not None and d is not None)


def move(value: Any, direction: Any, step: float) -> Any:
    if direction is None:
        return value
    if isinstance(value, list):
        return [move(*pair, step) for pair in zip(value, direction, strict=True)]
    return np.asarray(value + step * direction)


def nudge(value: Any, direction: Any, rng: np.random.Generator) -> Any:
    if direction is None:
        return value
    if isinstance(value, list):
        return [nudge(*pair, rng) for pair in zip(value, direction, strict=True)]
    return value * (1 + 0.01 * rng.uniform(0.5, 1, value.shape)) + 0.003 * rng.uniform(
        0.5, 1, value.shape
    )


def central_difference(
    function: Function, point: Point, weigh: Callable[[list[Any]], float]
) -> float:
    """The slope of ``weigh(function(x))``.

    Raises:
        NotSmoothError: it depends on the step.
    """
    slopes = [
        (weigh(function(point.moved(h))) - weigh(function(point.moved(-h)))) / (2 * h)
        for h in (STEP, STEP * 0.37)
    ]
    if not abs(slopes[0] - slopes[1]) <= TOLERANCE * (1 + abs(slopes[0])):
        raise NotSmoothError(f"{slopes}")
    return slopes[1]


def weights_of(outputs: Sequence[Any], rng: np.random.Generator) -> list[np.ndarray | None]:
    """A random weight for every finite float of the outputs."""
    return [
        rng.normal(size=o.shape) * np.isfinite(o) if is_float(o) else None
        for o in leaves(list(outputs))
    ]


def weighed(outputs: Sequence[Any], weights: Sequence[np.ndarray | None]) -> float:
    pairs = zip(leaves(list(outputs)), weights, strict=True)
    return sum(float((w * np.where(w != 0, o, 0)).sum()) for o, w in pairs if w is not None)


class Loaded:
    """A model loaded by qwrap to compute in float64: values and derivatives."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = qwrap.load(with_floats(model, TensorProto.FLOAT), dtype=torch.float64).eval()
        self._graph = self._model.graph

    def _tensors(self, inputs: Sequence[Any]) -> list[Any]:
        kinds = [self._graph.type_of(declared) for declared in self._graph.inputs]
        device = torch.device("cpu")
        return [to_value(*pair, device) for pair in zip(inputs, kinds, strict=False)]

    def _outputs(self, tensors: Sequence[Any]) -> list[Any]:
        results = self._model(*tensors)
        return [results] if len(self._graph.outputs) == 1 else list(results)

    @torch.no_grad()
    def values(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs as arrays."""
        outputs = self._outputs(self._tensors(inputs))
        kinds = [self._graph.type_of(declared) for declared in self._graph.outputs]
        return [to_array(*pair) for pair in zip(outputs, kinds, strict=True)]

    def gradients(self, inputs: Sequence[Any], weights: Sequence[np.ndarray | None]) -> list[Any]:
        """Gradients of the weighed sum of the outputs, as nested as the inputs."""
        tensors = self._tensors(inputs)
        wanted = [t for t in leaves(tensors) if is_trainable(t)]
        for tensor in wanted:
            tensor.requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for output, weight in zip(leaves(self._outputs(tensors)), weights, strict=True):
            if weight is not None:
                weight_tensor = torch.from_numpy(np.asarray(weight))
                total = total + (weight_tensor * torch.where(weight_tensor != 0, output, 0)).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        return [gradient_of(tensor) for tensor in tensors]


def is_trainable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def gradient_of(value: Any) -> Any:
    if isinstance(value, list):
        return [gradient_of(item) for item in value]
    if not is_trainable(value) or value.grad is None:
        return None
    return value.grad.numpy()


def check(
    model: onnx.ModelProto,
    inputs: Sequence[Any],
    function: Function | None = None,
    still: Collection[int] = (),
) -> None:
    """Compare autograd with central differences near ``inputs``.

    Not at them: examples like to sit on kinks, and have ties.

    Args:
        model: with floats of any type.
        function: what to differentiate by differences; without one, the loaded model itself.
        still: indices of the inputs that do not move.

    Raises:
        NotSmoothError: no smooth point was found.
    """
    rng = np.random.default_rng(3)
    loaded = Loaded(model)
    numbers = steering(model)
    given = [v.name for v in model.graph.input][: len(inputs)]
    moving = [
        i not in still and name not in numbers and any(map(is_float, leaves(value)))
        for i, (name, value) in enumerate(zip(given, inputs, strict=True))
    ]
    point = Point(inputs, moving, rng)
    for attempt in range(ATTEMPTS):
        point = point.jittered(rng)
        base = (function or loaded.values)(point.inputs)
        weights = weights_of(base, rng)
        try:
            wanted = central_difference(
                function or loaded.values, point, lambda o, w=weights: weighed(o, w)
            )
        except NotSmoothError:
            if attempt == ATTEMPTS - 1:
                raise
            continue
        got = point.slope(loaded.gradients(point.inputs, weights))
        assert abs(got - wanted) <= TOLERANCE * (1 + abs(wanted)), f"autograd {got}, slope {wanted}"
        return
