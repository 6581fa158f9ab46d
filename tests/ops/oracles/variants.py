"""One-operator models to compare: what they hold, and the table of who makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Arrays = list[np.ndarray | None]
Make = Callable[[int], Arrays]  # a size -> inputs; other sizes, other shapes

SIZES = (3, 5)


@dataclass
class Variant:
    """One way to use one revision of an operator.

    Attributes:
        make: the inputs for a size; None where one is left out.
        attributes: of the node; those that are None are left out.
        outputs: how many outputs the node names.
        constants: indices of the inputs that are initialisers even in the dynamic model.
        nodes: ONNX text in place of one node, from x0, x1 ... to y0, y1 ...
        rtol: relative tolerance.
        atol: absolute tolerance.
        random: only shapes and types can be compared.
    """

    make: Make
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    constants: tuple[int, ...] = ()
    nodes: str = ""
    rtol: float = 0.0
    atol: float = 0.0
    random: bool = False


Generator = Callable[[int], Iterable[Variant]]
GENERATORS: dict[str, Generator] = {}


def variants(*op_types: str) -> Callable[[Generator], Generator]:
    """Register the decorated function: it takes a revision and yields variants."""

    def register(generator: Generator) -> Generator:
        for op_type in op_types:
            assert op_type not in GENERATORS
            GENERATORS[op_type] = generator
        return generator

    return register


def revisions() -> Iterator[onnx.defs.OpSchema]:
    """Yield the schema of every operator of ai.onnx and revision."""
    for schema in sorted(
        onnx.defs.get_all_schemas_with_history(), key=lambda s: (s.name, s.since_version)
    ):
        if schema.domain == "":
            yield schema


def types_of(schema: onnx.defs.OpSchema, index: int = 0) -> set[type]:
    """The numpy types that an input may have, those that numpy has itself."""
    declared = schema.inputs[min(index, len(schema.inputs) - 1)].types
    found = set()
    for text in declared:
        if text.startswith("tensor("):
            name = text[len("tensor(") : -1].upper()
            found.add(helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, name)).type)
    return found


class Draw:
    """Reproducible arrays; seeded anew for every set of inputs."""

    def __init__(self) -> None:
        self.seed()

    def seed(self) -> None:
        self._rng = np.random.default_rng(11)

    def __call__(
        self, *shape: int, low: float = -2.0, high: float = 2.0, dtype: type = np.float32
    ) -> np.ndarray:
        return self._rng.uniform(low, high, shape).astype(dtype)

    def ints(
        self, *shape: int, low: int = -9, high: int = 10, dtype: type = np.int64
    ) -> np.ndarray:
        return self._rng.integers(max(low, np.iinfo(dtype).min), high, shape).astype(dtype)

    def of(self, dtype: type, *shape: int) -> np.ndarray:
        """Values of any type."""
        if dtype is np.bool_:
            return self._rng.integers(0, 2, shape).astype(np.bool_)
        if np.issubdtype(dtype, np.integer):
            return self.ints(*shape, dtype=dtype)
        if dtype is np.object_:
            words = np.array(["a", "bc", "déf", ""], object)
            return np.asarray(words[self._rng.integers(0, 4, shape)], object)
        return self(*shape, dtype=dtype)

    def distinct(self, *shape: int, dtype: type = np.float32) -> np.ndarray:
        """Values no two of which are equal: ties are broken differently."""
        count = int(np.prod(shape))
        return (self._rng.permutation(count) - count / 2).reshape(shape).astype(dtype)


draw = Draw()


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: Any, dtype: type = np.float32) -> np.ndarray:
    return np.array(value, dtype)


def inputs_of(variant: Variant, size: int) -> Arrays:
    draw.seed()
    return [None if a is None else np.asarray(a) for a in variant.make(size)]


def build(
    op_type: str, opset: int, variant: Variant, inputs: Sequence[Arrays], dynamic: bool
) -> onnx.ModelProto:
    """The model of a variant.

    Args:
        inputs: what it is to take; shapes are declared after the first.
        dynamic: every input is a graph input, and shapes that differ are symbolic; else integers
            after the first input are initialisers.
    """
    names = [f"x{i}" for i in range(len(inputs[0]))]
    declared, initialisers = [], []
    for i, array in enumerate(inputs[0]):
        if array is None:
            continue
        steers = i > 0 and array.dtype.kind == "i" and array.ndim <= 1
        if i in variant.constants or (steers and not dynamic):
            initialisers.append(numpy_helper.from_array(array, names[i]))
            continue
        is_open = dynamic and not (steers and len({a[i].shape for a in inputs}) == 1)
        shape = [f"d{i}_{n}" for n in range(array.ndim)] if is_open else array.shape
        declared.append(helper.make_tensor_value_info(names[i], element_type(array), shape))
    graph = helper.make_graph(
        nodes_of(op_type, opset, variant, inputs[0]),
        "one_operator",
        declared,
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(variant.outputs)],
        initialisers,
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 21 else 10)
    return with_output_types(model, op_type, opset, inputs[0])


def element_type(array: np.ndarray) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


def nodes_of(op_type: str, opset: int, variant: Variant, inputs: Arrays) -> list[onnx.NodeProto]:
    if variant.nodes:
        names = ", ".join(f"float y{i}" for i in range(variant.outputs))
        text = f'<ir_version: 8, opset_import: ["": {opset}]> g () => ({names}) {{{variant.nodes}}}'
        graph = onnx.parser.parse_model(text).graph
        forget_shapes(graph)
        return list(graph.node)
    attributes = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in variant.attributes.items()
        if value is not None
    }
    names = ["" if a is None else f"x{i}" for i, a in enumerate(inputs)]
    results = [f"y{i}" for i in range(variant.outputs)]
    return [helper.make_node(op_type, names, results, **attributes)]


def forget_shapes(graph: onnx.GraphProto) -> None:
    """Remove the shapes that the text form gives to floats of bodies, in place.

    What is no float stays a scalar, as it reads.
    """
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            forget_shapes(attribute.g)


def with_output_types(
    model: onnx.ModelProto, op_type: str, opset: int, inputs: Arrays
) -> onnx.ModelProto:
    """Declare the element types of the outputs; their shapes are left to the run."""
    inferred = onnx.shape_inference.infer_shapes(model)
    schema = onnx.defs.get_schema(op_type, opset)
    for i, output in enumerate(inferred.graph.output):
        if not output.type.HasField("tensor_type"):
            output.type.tensor_type.elem_type = type_by_schema(schema, i, inputs)
        output.type.tensor_type.ClearField("shape")
    return inferred


def type_by_schema(schema: onnx.defs.OpSchema, index: int, inputs: Arrays) -> int:
    """The type of an output that has the type of an input, or a fixed one.

    The first schemas came without inference.
    """
    wanted = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    for formal, array in zip(schema.inputs, inputs, strict=False):
        if formal.type_str == wanted and array is not None:
            return element_type(array)
    if not wanted.startswith("tensor("):  # an attribute tells; the first Cast
        return int(onnx.TensorProto.FLOAT)
    name = wanted.removeprefix("tensor(").removesuffix(")").upper()
    return int(getattr(onnx.TensorProto, name))
