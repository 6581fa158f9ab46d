"""The exact simulation: integer kernels in place of operators, as onnxruntime fuses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.errors import ConfigError
from qwrap.model.attributes import attributes_of
from qwrap.model.operators import function_of_node
from qwrap.model.points import Point, Program, UsePoint, ValuePoint
from qwrap.model.shards import check_unsharded
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import quantize
from qwrap.ops.traits import WEIGHTED
from qwrap.quant import kernels as k
from qwrap.quant.clamp import Clamp
from qwrap.quant.live import live_layers
from qwrap.quant.placement.specs import is_fusable, is_fusable_weight
from qwrap.quant.placement.target import ORT_CPU
from qwrap.quant.plan import NodePlan, QuantPlan
from qwrap.quant.sources import source_of, written_by
from qwrap.quant.stubs import BiasStub, Stub


@contextmanager
def exact(model: WrappedModel) -> Iterator[None]:
    """Compute with onnxruntime's integer arithmetic inside the ``with`` block.

    Weights are quantized once, on entry. There are no gradients, and no scale follows the data.

    Raises:
        ConfigError: the model is not prepared.
        NotCalibratedError: it is not calibrated.
        ModelError: its parameters are sharded.
    """
    if "exact" not in model.programs:
        raise ConfigError("the model is not prepared; call prepare() and calibrate() first")
    with torch.no_grad(), _standing_still(model), model.running("exact"):
        yield


@contextmanager
def _standing_still(model: WrappedModel) -> Iterator[None]:
    """Let no scale follow the data inside the ``with`` block: the kernels know those it has now."""
    taps = [model.tap(point) for point in model.attached]
    following = [tap for tap in taps if isinstance(tap, Stub) and tap.following]
    for stub in following:
        stub.following = False
    try:
        yield
    finally:
        for stub in following:
            stub.following = True


def exact_program(model: WrappedModel) -> Program:
    """Return the program in which fused kernels stand in for the nodes they replace.

    Raises:
        ModelError: the parameters are sharded.
    """
    check_unsharded(model)
    return _Lowering(model).program()


class _Lowering:
    def __init__(self, model: WrappedModel) -> None:
        self.model = model
        assert isinstance(model.plan, QuantPlan)
        self.plan = model.plan
        self.scales = self.plan.scales()
        self.graph = model.graph

    def program(self) -> Program:
        kernels: dict[str, Callable[..., Any]] = {}
        made: set[str] = set()
        for key, planned in self.plan.nodes.items():
            node = self.graph.nodes[key]
            if self._is_fused(node, planned) and self._fits(node):
                kernels[key] = self._kernel(node)
                made.add(self.graph.key(node.outputs[0]))
                made.add(self.graph.key(written_by(self.plan, self.graph, node)))
            elif planned.role == "absorbed" and self._fits(self._producer(node)):
                kernels[key] = k.pass_through
        taps: dict[Point, Callable[[Tensor], Tensor]] = {}
        for point in self.model.attached:
            on_output = isinstance(point, ValuePoint) and point.value in made
            # A kernel holds its weight and bias as codes; a constant operand it reads on its grid.
            in_kernel = isinstance(point, UsePoint) and self._is_constant(point, kernels)
            if not on_output and not in_kernel:
                taps[point] = self.model.tap(point)
        live = (key for key, _ in live_layers(self.model) if key not in kernels)
        for key in live:  # as deployed, in training mode too
            function = function_of_node(self.model, key)
            assert function is not None
            kernels[key] = function
        return Program(taps=taps, kernels=kernels)

    def _is_constant(self, point: UsePoint, kernels: Mapping[str, object]) -> bool:
        """Whether a kernel has the input as codes already: a weight or bias."""
        matrix = point.node in kernels and self.graph.nodes[point.node].op_type in ORT_CPU.matrix
        use = point.node, point.index
        return matrix and (use in self.plan.constants or use in self.plan.biases)

    def _is_fused(self, node: ir.Node, planned: NodePlan) -> bool:
        """Whether onnxruntime takes an integer kernel: it does wherever the pairs around allow.

        That may be so for a node which the plan leaves float, because of its neighbours' pairs.
        """
        if planned.role == "integer" or node.op_type not in ORT_CPU.elementwise or node.domain:
            return planned.role == "integer"
        if self.graph.node_key(node) in self.plan.half:  # casts stand between it and the pairs
            return False
        values = [*node.inputs[self._first(node) :], node.outputs[0]]
        return all(v is not None and self.graph.key(v) in self.plan.tensors for v in values)

    def _producer(self, node: ir.Node) -> ir.Node:
        value = node.inputs[0]
        producer = None if value is None else value.producer()
        assert producer is not None, "an absorbed node has a producer"
        return producer

    def _fits(self, node: ir.Node) -> bool:
        """Whether onnxruntime has the kernel: for codes of 8 bits, with scales of float32.

        What was placed for another target may have none here, or no pair behind it.
        """
        key, written = self.graph.node_key(node), written_by(self.plan, self.graph, node)
        if node.op_type in ORT_CPU.matrix:
            if (key, WEIGHTED[node.op_type].weight) not in self.plan.constants:
                return False
        elif node.op_type not in ORT_CPU.elementwise:
            return False
        inputs = [(i, v) for i, v in enumerate(node.inputs) if v is not None]
        read = [self.plan.read_by(key, i, self.graph.key(v)) for i, v in inputs]
        source = source_of(self.plan, self.graph, written)
        if source is None and node.op_type not in ORT_CPU.float_output:
            return False
        specs = [self.scales[k].spec for k in (*read, source) if k]
        points = [(key, i) for i in range(len(node.inputs))]
        constants = [self.plan.constants[p].spec for p in points if p in self.plan.constants]
        stored = is_fusable_weight if node.op_type in ORT_CPU.matrix else is_fusable
        fits = all(map(is_fusable, specs)) and all(map(stored, constants))
        specs += [] if node.op_type in ORT_CPU.matrix else constants
        fits = fits and len({spec.dtype for spec in specs}) <= 1 and self._clamps(written)
        fits = fits and (node.op_type not in ORT_CPU.matrix or (key, 1) in self.plan.constants)
        # Beside constants of other types the pairs are kept from all kernels.
        return fits and not self._has_float_bias(node) and not self.plan.kept_apart

    def _clamps(self, output: ir.Value | None) -> bool:
        """Whether codes stand for the activation function behind a node, if one was absorbed."""
        producer = None if output is None else output.producer()
        if producer is None:
            return True
        clamp = self.model.kernels.get(self.graph.node_key(producer))
        return clamp.covers() if isinstance(clamp, Clamp) else True

    def _has_float_bias(self, node: ir.Node) -> bool:
        index = WEIGHTED[node.op_type].bias if node.op_type in WEIGHTED else None
        given = index is not None and len(node.inputs) > index and node.inputs[index] is not None
        return given and (self.graph.node_key(node), index) not in self.plan.biases

    def _stub(self, point: Point) -> Stub:
        stub = self.model.tap(point)
        assert isinstance(stub, Stub)
        return stub

    def _grid(self, stub: Stub) -> k.Grid:
        qparams = stub.qparams
        return k.Grid(qparams.scale, int(qparams.zero_point), stub.spec.dtype)

    def _input_grid(self, node: ir.Node, index: int) -> k.Grid:
        value = node.inputs[index]
        assert value is not None
        key = self.graph.node_key(node)
        if (key, index) in self.plan.constants:
            return self._grid(self._stub(UsePoint(key, index)))
        read = self.plan.read_by(key, index, self.graph.key(value))
        assert read is not None
        return self._grid(self._stub(self.plan.point_of(read)))

    def _output_grid(self, node: ir.Node) -> k.Grid | None:
        source = source_of(self.plan, self.graph, written_by(self.plan, self.graph, node))
        return None if source is None else self._grid(self._stub(self.plan.point_of(source)))

    def _weight(self, node: ir.Node) -> tuple[Tensor, Tensor]:
        """Return the weight's codes minus zero point, and its scale."""
        key = self.graph.node_key(node)
        stub = self._stub(UsePoint(key, 1))
        value = self.model.deployed(self.plan.constants[key, 1].value)
        assert value is not None
        qparams = stub.qparams
        codes = quantize(value, qparams, stub.grid)
        zero_point = qparams.zero_point.int()
        if qparams.axis is not None:
            zero_point = zero_point.reshape(-1, *[1] * (value.ndim - 1 - qparams.axis))
        return codes.int() - zero_point, qparams.scale

    def _bias(self, node: ir.Node) -> Tensor | None:
        point = (self.graph.node_key(node), 2)
        if point not in self.plan.biases:
            return None
        stub, value = (
            self.model.tap(UsePoint(*point)),
            self.model.deployed(self.plan.biases[point].value),
        )
        assert isinstance(stub, BiasStub)
        assert value is not None
        return stub.codes(value)

    def _kernel(self, node: ir.Node) -> Callable[..., Any]:
        x, y = self._input_grid(node, self._first(node)), self._output_grid(node)
        settings = attributes_of(node)
        if node.op_type in ORT_CPU.matrix:
            return self._matrix(node, x, y, settings)
        assert y is not None
        return self._elementwise(node, x, y, settings)

    def _first(self, node: ir.Node) -> int:
        return 1 if node.op_type == "Where" else 0

    def _matrix(
        self, node: ir.Node, x: k.Grid, y: k.Grid | None, settings: dict[str, Any]
    ) -> Callable[..., Any]:
        weight, scale = self._weight(node)
        if node.op_type == "MatMul":
            return k.qlinear_matmul(x, weight, scale, y)
        if node.op_type == "Gemm":
            names = ("transA", "transB")
            flags = {name: settings.get(name, 0) for name in names}
            return k.qgemm(x, weight, scale, self._bias(node), y, **flags)
        assert y is not None
        settings.pop("kernel_shape", None)
        return k.qlinear_conv(x, weight, scale, self._bias(node), y, **settings)

    def _elementwise(
        self, node: ir.Node, x: k.Grid, y: k.Grid, settings: dict[str, Any]
    ) -> Callable[..., Any]:
        kind = node.op_type
        if kind == "Add":
            return k.qlinear_add(x, self._input_grid(node, 1), y)
        if kind == "Mul":
            return k.QLinearMul(x, self._input_grid(node, 1), y)
        if kind == "Concat":
            rank = self.graph.type_of(node.outputs[0]).rank or 0
            return k.QLinearConcat(y, settings["axis"] % rank if rank else settings["axis"])
        if kind == "Where":
            return k.QLinearWhere(y)
        if kind == "LeakyRelu":
            return k.qlinear_leaky_relu(x, y, **settings)
        if kind == "Sigmoid":
            return k.qlinear_sigmoid(x, y)
        if kind == "GlobalAveragePool":
            return k.QLinearGlobalAveragePool(x, y)
        if kind == "AveragePool":
            return k.QLinearAveragePool(y=y, **settings)
        flatten = self.graph.opset < 13
        return k.QLinearSoftmax(x, y, settings.get("axis", 1 if flatten else -1), flatten)
