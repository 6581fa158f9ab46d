"""Random small models, and random wishes for the types of their nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import qwrap

Shape = tuple[int, ...]
OPSETS = (13, 17, 21)
SCOPES = ("", "enc/", "dec/inner/")
TABLE = (1024, 16)  # as many elements as make a table worth storing as codes
IMAGE, ROWS = (2, 4, 6, 6), (2, 5, 8)
LARGEST = 1200  # elements; what would grow further is left as it is


@dataclass
class Body:
    """A graph in the making: its nodes, and the float tensors that they can read."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)


class RandomModel:
    """A model of ``count`` nodes; further ones make If and Loop bodies.

    Attributes:
        proto: the model.
        nodes: names of all nodes, those in bodies too, in topological order.
    """

    def __init__(self, random: Random, count: int) -> None:
        self.random, self.opset = random, random.choice(OPSETS)
        self._numbers = np.random.default_rng(random.randrange(2**16))
        self._constants: dict[str, np.ndarray] = {}
        self._inputs: dict[str, tuple[int, Shape]] = {"x": (TensorProto.FLOAT, IMAGE)}
        self.nodes: list[str] = []
        self._body = Body(shapes={"x": IMAGE})
        if random.random() < 0.4:
            self._add_input("u", random.choice((IMAGE, ROWS)))
        main = self._body
        while len(main.nodes) < count:
            self._grow()
        self.proto = self._finish(main)

    @property
    def has_bodies(self) -> bool:
        return any(node.op_type in ("If", "Loop") for node in self.proto.graph.node)

    def batches(self, count: int = 2) -> Iterator[dict[str, np.ndarray]]:
        for number in range(count):
            yield {
                name: self._fill(kind, shape, number)
                for name, (kind, shape) in self._inputs.items()
            }

    def _fill(self, kind: int, shape: Shape, number: int) -> np.ndarray:
        random = np.random.default_rng(number)
        if kind == TensorProto.BOOL:
            return np.array(number % 2 == 0)
        if kind == TensorProto.INT64:
            return random.integers(0, TABLE[0], shape)
        return random.normal(0, 1, shape).astype(np.float32)

    # --- parts -----------------------------------------------------------------------------------

    def _add_input(self, name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> str:
        self._inputs[name] = kind, shape
        if kind == TensorProto.FLOAT:
            self._body.shapes[name] = shape
        return name

    def _constant(self, shape: Shape) -> str:
        """Return a constant of normal values; often one that others read too."""
        same = [n for n, a in self._constants.items() if a.shape == shape and a.dtype == np.float32]
        if same and self.random.random() < 0.4:
            return self.random.choice(same)
        return self._store(self._numbers.normal(0, 0.4, shape).astype(np.float32))

    def _store(self, array: np.ndarray) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = array
        return name

    def _integers(self, *numbers: int) -> str:
        return self._store(np.array(numbers, np.int64))

    def _add(self, kind: str, inputs: list[str], *shapes: Shape, **attributes: object) -> str:
        """Add a node; returns its first output."""
        number = len(self.nodes)
        outputs = [f"t{number}" + ("" if i == 0 else f"_{i}") for i in range(len(shapes))]
        name = f"/{self.random.choice(SCOPES)}{kind.lower()}_{number}"
        self.nodes.append(name)
        self._body.nodes.append(helper.make_node(kind, inputs, outputs, name, **attributes))
        self._body.shapes |= dict(zip(outputs, shapes, strict=True))
        return outputs[0]

    def _pick(self, fits: Callable[[Shape], bool] = lambda _: True) -> tuple[str, Shape] | None:
        """Return one of the tensors; late ones more often, so that graphs are deep."""
        found = [item for item in self._body.shapes.items() if fits(item[1])]
        if not found:
            return None
        return self.random.choice(found[-3:] if self.random.random() < 0.6 else found)

    # --- nodes -----------------------------------------------------------------------------------

    def _grow(self) -> None:
        kind = self.random.choice((
            "image", "image", "matrix", "pair", "pair", "unary", "unary", "moved", "moved",
            "joined",
            "image", "matrix", "unary", "moved", "lookup", "norm", "body",
        ))  # fmt: skip
        getattr(self, "_inner" if kind == "body" else f"_{kind}")()

    def _image(self) -> None:
        found = self._pick(lambda s: len(s) == 4 and min(s[2:]) >= 2)
        if found is None:
            return
        x, (n, c, h, w) = found
        kind, m = self.random.choice(("Conv", "Conv", "ConvTranspose", "AveragePool")), 4
        if kind == "AveragePool":
            self._add(kind, [x], (n, c, h - 1, w - 1), kernel_shape=[2, 2])
            return
        k = self.random.choice((1, 3))
        shape = (m, c, k, k) if kind == "Conv" else (c, m, k, k)
        inputs = [x, self._constant(shape)]
        if self.random.random() < 0.6:
            inputs.append(self._constant((m,)))
        self._add(kind, inputs, (n, m, h, w), pads=[k // 2] * 4, kernel_shape=[k, k])

    def _matrix(self) -> None:
        x, shape = self._pick() or ("x", IMAGE)
        if len(shape) == 2 and self.random.random() < 0.7:
            flag = self.random.randrange(2)
            weight = self._constant((6, shape[1]) if flag else (shape[1], 6))
            bias = [self._constant((6,))] if self.random.random() < 0.6 else []
            self._add("Gemm", [x, weight, *bias], (shape[0], 6), transB=flag)
            return
        square = self._pick(lambda s: s == shape and s[-1] == s[-2])
        if square is not None and self.random.random() < 0.3:
            self._add("MatMul", [x, square[0]], shape)
            return
        self._add("MatMul", [x, self._constant((shape[-1], 6))], (*shape[:-1], 6))

    def _pair(self) -> None:
        x, shape = self._pick() or ("x", IMAGE)
        kind = self.random.choice(("Add", "Add", "Mul", "Where"))
        other = self._pick(lambda s: s == shape) if self.random.random() < 0.7 else None
        z = self._constant((shape[-1],)) if other is None else other[0]
        inputs = [x, z] if self.random.random() < 0.8 else [z, x]
        if kind == "Where":
            inputs = [self._store(self._numbers.random(shape[-1]) < 0.5), *inputs]
        self._add(kind, inputs, shape)

    def _unary(self) -> None:
        x, shape = self._pick() or ("x", IMAGE)
        kinds = ("Relu", "Relu", "Clip", "Sigmoid", "Softmax", "Tanh", "Sin", "LeakyRelu")
        kind = self.random.choice(kinds)
        inputs = [x]
        if kind == "Clip":
            low = self.random.choice((0.0, -1.0))
            inputs += [self._store(np.float32(low)), self._store(np.float32(1.0))]
        self._add(kind, inputs, shape, **({"axis": -1} if kind == "Softmax" else {}))

    def _norm(self) -> None:
        x, shape = self._pick() or ("x", IMAGE)
        if self.opset >= 17 and shape[-1] > 1:
            last = (shape[-1],)
            self._add("LayerNormalization", [x, self._constant(last), self._constant(last)], shape)

    def _joined(self) -> None:
        x, shape = self._pick() or ("x", IMAGE)
        other = self._pick(lambda s: s == shape) or (x, shape)
        if len(shape) > 1 and np.prod(shape) <= LARGEST // 2:
            joined = (shape[0], 2 * shape[1], *shape[2:])
            self._add("Concat", [x, other[0]], joined, axis=1)

    def _lookup(self) -> None:
        ids = self._inputs.get("ids")
        if ids is None:
            self._add_input("ids", (2, 3), TensorProto.INT64)
        table = self._constant(TABLE)
        self._add("Gather", [table, "ids"], (2, 3, TABLE[1]), axis=0)

    def _moved(self) -> None:
        kind = self.random.choice((
            "Reshape", "Transpose", "Slice", "Split", "MaxPool", "Resize", "Gather", "Identity",
        ))  # fmt: skip
        found = self._pick(lambda s: len(s) == 4 if kind in ("MaxPool", "Resize") else len(s) > 1)
        if found is None:
            return
        x, shape = found
        n, c, *rest = shape
        if kind == "Reshape":
            flat = (n, int(np.prod(shape[1:])))
            self._add(kind, [x, self._integers(0, -1)], flat)
        elif kind == "Transpose":
            order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            self._add(kind, [x], tuple(shape[i] for i in order), perm=order)
        elif kind == "Slice" and shape[-1] > 2:
            ends = self._integers(0), self._integers(shape[-1] - 1), self._integers(-1)
            self._add(kind, [x, *ends], (*shape[:-1], shape[-1] - 1))
        elif kind == "Split" and c % 2 == 0:
            half = (n, c // 2, *rest)
            self._add(kind, [x, self._integers(c // 2, c // 2)], half, half, axis=1)
        elif kind == "MaxPool" and min(rest) >= 2:
            self._add(kind, [x], (n, c, rest[0] - 1, rest[1] - 1), kernel_shape=[2, 2])
        elif kind == "Resize" and np.prod(shape) <= LARGEST // 4:
            scales = self._store(np.array([1, 1, 2, 2], np.float32))
            settings = {"mode": "nearest", "nearest_mode": "floor"}
            settings["coordinate_transformation_mode"] = "asymmetric"
            self._add(kind, [x, "", scales], (n, c, 2 * rest[0], 2 * rest[1]), **settings)
        elif kind == "Gather":
            self._add(kind, [x, self._integers(0, c - 1)], (n, 2, *rest), axis=1)
        elif kind == "Identity":
            self._add(kind, [x], shape)

    # --- bodies ----------------------------------------------------------------------------------

    def _body_graph(self, name: str, start: str, extra: Body) -> onnx.GraphProto:
        """Return a body whose one output has the shape of ``start``, which it reads."""
        outer, self._body = self._body, extra
        value, shape = start, extra.shapes[start]
        for _ in range(self.random.randrange(1, 4)):
            value = self._same_shape(value, shape)
        self._body = outer
        unknown = [None] * len(shape)
        output = helper.make_tensor_value_info(value, TensorProto.FLOAT, unknown)
        inputs = [i for i in (f"i_{name}", f"k_{name}", start) if name.startswith("loop")]
        kinds = (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT)
        infos = [
            helper.make_tensor_value_info(i, kind, unknown if i == start else [])
            for i, kind in zip(inputs, kinds, strict=False)
        ]
        outputs = [output]
        if inputs:
            extra.nodes.append(
                helper.make_node("Identity", [inputs[1]], [f"o_{name}"], f"/{name}o")
            )
            outputs.insert(0, helper.make_tensor_value_info(f"o_{name}", TensorProto.BOOL, []))
        return helper.make_graph(extra.nodes, name, infos, outputs)

    def _same_shape(self, x: str, shape: Shape) -> str:
        kind = self.random.choice(("Conv", "MatMul", "Add", "Relu", "Sigmoid", "Tanh", "Identity"))
        if kind == "Conv" and len(shape) == 4:
            weight = self._constant((shape[1], shape[1], 1, 1))
            return self._add(kind, [x, weight], shape, kernel_shape=[1, 1])
        if kind in ("Conv", "MatMul"):
            return self._add("MatMul", [x, self._constant((shape[-1], shape[-1]))], shape)
        if kind == "Add":
            other = self._pick(lambda s: s == shape)
            return self._add(kind, [x, other[0] if other else x], shape)
        return self._add(kind, [x], shape)

    def _inner(self) -> None:
        x, shape = self._pick() or ("x", IMAGE)
        number = len(self.nodes)
        if self.random.random() < 0.5:
            self._inputs["c"] = TensorProto.BOOL, ()
            then, other = (
                self._body_graph(f"{b}_{number}", x, Body(shapes=dict(self._body.shapes)))
                for b in ("then", "else")
            )
            self._add("If", ["c"], shape, then_branch=then, else_branch=other)
            return
        carried = f"v_{number}"
        body = Body(shapes={**self._body.shapes, carried: shape})
        graph = self._body_graph(f"loop_{number}", carried, body)
        trips = self._store(np.array(2, np.int64))
        self._add("Loop", [trips, "", x], shape, body=graph)

    # --- the whole -------------------------------------------------------------------------------

    def _finish(self, main: Body) -> onnx.ModelProto:
        read = set(_read(main.nodes))
        made = [name for node in main.nodes for name in node.output]
        ends = [n for n in made if n not in read or self.random.random() < 0.15]
        inputs = {n: v for n, v in self._inputs.items() if n in read or n == "x"}
        self._inputs = inputs
        first = "N" if self.random.random() < 0.3 else None
        infos = [
            helper.make_tensor_value_info(n, kind, [first or s, *rest] if shape else [])
            for n, (kind, shape) in inputs.items()
            for s, *rest in [shape or (0,)]
        ]
        outputs = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * len(main.shapes[n]))
            for n in ends
        ]
        stored = [numpy_helper.from_array(a, n) for n, a in self._constants.items() if n in read]
        graph = helper.make_graph(main.nodes, "random", infos, outputs, stored)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def _read(nodes: list[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _read(list(attribute.g.node))
            yield from (output.name for output in attribute.g.output)


# --- wishes --------------------------------------------------------------------------------------

ACTIVATIONS = ("uint8", "int8", "uint16", "int16", "uint4", "int4", "float32")
WEIGHTS = ("int8", "int4", "int16", "uint8")


def random_config(random: Random, source: RandomModel) -> qwrap.QConfig:
    """Return settings with up to three regions."""
    config = qwrap.QConfig(
        activation=random.choice(("uint8", "uint8", "uint16", "int8", None)),
        weight=random.choice(WEIGHTS),
        per_channel=random.random() < 0.5,
        method="minmax",
        scope=random.choice(("faster", "kernels", "kernels", "all", "all", None)),
        contrib=random.random() < 0.3,
    )
    for _ in range(random.randrange(4)):
        to = None
        selector = random_selector(random, source)
        if random.random() < 0.2:
            first, last = sorted(random.choices(range(len(source.nodes)), k=2))
            selector, to = source.nodes[first], source.nodes[last]
        kinds = random.choice(("activation", "activation", "both", "weight"))
        activation = random.choice(ACTIVATIONS) if kinds != "weight" else None
        weight = random.choice((*WEIGHTS, "float32")) if kinds != "activation" else None
        config.set(selector, to=to, activation=activation, weight=weight)
    return config


def random_selector(random: Random, source: RandomModel) -> str | list[str]:
    """Return a selector of some kind that fits nodes of the model."""
    nodes = source.nodes
    name = random.choice(nodes)
    kind = random.choice(("names", "glob", "type", "tensor", "scope"))
    if kind == "names":
        return [random.choice(nodes) for _ in range(random.randrange(1, 4))]
    if kind == "glob":
        return random.choice(("*", f"{name[:-1]}?", f"{name.rsplit('_', 1)[0]}*"))
    if kind == "type":
        return random.choice([node.op_type for node in source.proto.graph.node])
    if kind == "tensor":
        return random.choice([node.output[0] for node in source.proto.graph.node])
    scopes = [scope for scope in ("enc", "dec") if any(n.startswith(f"/{scope}/") for n in nodes)]
    return f"/{random.choice(scopes)}/*" if scopes else name
