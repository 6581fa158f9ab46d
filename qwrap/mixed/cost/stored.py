"""How many bytes the constants of a prepared model take in the file that it becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import INT32
from qwrap.export.custom import FunctionCalls
from qwrap.export.quantizers import Quantizers
from qwrap.graph.constants import Constants
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, scale_shape
from qwrap.quant.plan import ConstantPlan
from qwrap.quant.prepare import plan_of

Identity = tuple[object, ...]
BYTE = 8
HALF = ir.DataType.FLOAT16


class StoredSizes:
    """Bytes of weights, biases and other constants, without making their codes.

    Scales and zero points are made as the exporter makes them, in a graph that is thrown away; of
    the codes only the type is asked. Scales and zero points of activations are not counted: they
    are some bytes for each tensor, whatever its type.
    """

    def __init__(self, model: WrappedModel) -> None:
        """Look at a prepared model; it need not be calibrated."""
        self.graph, self.plan = model.graph, plan_of(model)
        self._constants = Constants(model.graph.model)
        self._opsets = dict(model.graph.model.graph.opset_imports)
        specs = [tensor.spec for tensor in self.plan.tensors.values()]
        self._in_float = any(not spec.dtype.is_standard for spec in specs)
        self._half = {(key, i) for key, plan in self.plan.half.items() for i in plan.inputs}
        self._replaced = set(self.plan.constants) | set(self.plan.biases) | self._half
        self._known: dict[tuple[object, ...], int] = {}

    def of(self, nodes: Iterable[str], seen: set[Identity]) -> int:
        """Return the bytes of all constants that ``nodes`` read.

        Args:
            nodes: keys; those that the graph does not have are passed over.
            seen: what was counted already; it takes in, in place, what is counted now.
        """
        total = 0
        for key in nodes:
            node = self.graph.nodes.get(key)
            for index, value in enumerate(node.inputs if node is not None else ()):
                if value is None or self._constants.tensor(value) is None:
                    continue
                for identity, size in self._parts(key, index, value):
                    if identity not in seen:
                        seen.add(identity)
                        total += size
        return total

    def unread(self, seen: set[Identity]) -> int:
        """Return the bytes of the float initialisers that are in the file and not in ``seen``."""
        left = 0
        for value in self.graph.model.graph.initializers.values():
            key = self.graph.key(value)
            if (key, None) not in seen and self._stays_float(value):
                left += self._plain(value)
        return left

    def _parts(self, node: str, index: int, value: ir.Value) -> Iterator[tuple[Identity, int]]:
        """Yield what is stored for one input of one node; what is equal is stored once."""
        key = self.graph.key(value)
        constant, bias = (
            self.plan.constants.get((node, index)),
            self.plan.biases.get((node, index)),
        )
        if constant is not None and constant.spec.dtype.function is not None:
            yield (key, None), self._plain(value)
            yield (node, index), self._qparams_of_function(value, constant.spec)
        elif constant is not None:
            yield (key, constant.spec), self._codes(value, constant.spec)
        elif bias is not None:
            source = self.plan.constants[bias.weight]
            yield (key, bias.activation, source.value, source.spec), self._bias(value, source)
        elif (node, index) in self._half:
            yield (key, HALF), _packed(math.prod(self._shape(value)), HALF)
        if self._stays_float(value):
            yield (key, None), self._plain(value)

    def _stays_float(self, value: ir.Value) -> bool:
        """Whether a constant is in the file as it was: something reads it as such, or nothing."""
        uses = list(value.uses())
        if not uses or value.is_graph_output():
            return True
        return any((self.graph.node_key(u.node), u.idx) not in self._replaced for u in uses)

    def _plain(self, value: ir.Value) -> int:
        tensor = self._constants.tensor(value)
        assert tensor is not None
        return _packed(math.prod(tensor.shape.numpy()), tensor.dtype)

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        tensor = self._constants.tensor(value)
        assert tensor is not None
        return tuple(int(size) for size in tensor.shape.numpy())

    def _codes(self, value: ir.Value, spec: QuantSpec) -> int:
        shape = self._shape(value)
        as_function = spec.dtype.codebook or (self._in_float and spec.dtype.is_integer)
        real = self.graph.type_of(value).dtype or ir.DataType.FLOAT
        identity = (bool(as_function), spec, shape, real)
        if identity not in self._known:
            self._known[identity] = self._measured(spec, shape, real, bool(as_function))
        return self._known[identity]

    def _measured(
        self, spec: QuantSpec, shape: tuple[int, ...], real: ir.DataType, as_function: bool
    ) -> int:
        make = self._scratch()
        calls = FunctionCalls(make)
        few = torch.zeros(1, dtype=torch.int32)
        if as_function:
            codes = calls.codes("codes", few, spec.dtype)
        else:
            codes = make.codes("codes", few, spec.dtype)
        assert codes.const_value is not None
        size = _packed(math.prod(shape), codes.const_value.dtype)
        parameters = self._scratch()
        if as_function:
            FunctionCalls(parameters).parameters("x", _qparams(shape, spec), spec, shape)
        else:
            parameters.parameters("x", _qparams(shape, spec), spec, real)
        return size + _initialisers(parameters.draft)

    def _qparams_of_function(self, value: ir.Value, spec: QuantSpec) -> int:
        make, shape = self._scratch(), self._shape(value)
        FunctionCalls(make).parameters("x", _qparams(shape, spec), spec, shape)
        return _initialisers(make.draft)

    def _bias(self, value: ir.Value, weight: ConstantPlan) -> int:
        axis = 0 if weight.spec.axis is not None else None
        return self._codes(value, QuantSpec(dtype=INT32, axis=axis))

    def _scratch(self) -> Quantizers:
        graph = ir.Graph([], [], nodes=[], opset_imports=dict(self._opsets))
        return Quantizers(ir.Model(graph, ir_version=10))


def _qparams(shape: tuple[int, ...], spec: QuantSpec) -> QParams:
    """Return qparams of the right shape; zero points are not 0 where they can be another."""
    size = scale_shape(shape, spec)
    zero_point: Tensor = torch.zeros(size, dtype=torch.int32)
    if not spec.symmetric or not spec.dtype.signed:
        zero_point += 1
    return QParams(torch.ones(size), zero_point, spec.axis, spec.block_size)


def _initialisers(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(_packed(t.size, t.dtype) for t in tensors if t is not None)


def _packed(count: int, dtype: ir.DataType) -> int:
    """Return the bytes of ``count`` elements, of which small ones share bytes."""
    return -(-int(count) * dtype.bitwidth // BYTE)
