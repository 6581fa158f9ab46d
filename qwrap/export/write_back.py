"""A model that came from a quantized file, back in that file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.export.quantizers import as_array
from qwrap.graph.index import OnnxGraph
from qwrap.graph.original import Piece, with_values
from qwrap.model.materialize import changed_tensors
from qwrap.model.points import Point, UsePoint
from qwrap.model.tensors import to_torch
from qwrap.model.values import constant_tensor
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams, outer_scale, quantize, round_scale
from qwrap.quant.prepare import plan_of
from qwrap.quant.stubs import BiasStub, Stub

Kind = Literal["scale", "inner_scale", "outer_scale", "zero_point", "codes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """An input of a node of the file that says how a tensor is quantized, or holds its codes.

    Attributes:
        kind: what is there. The scales of NVFP4 are the product of an inner and an outer one.
        point: where the stub is that knows it now.
        node: key of the node.
        index: of the input.
        key: of the tensor that it reads, None for a zero point that is left out.
        value: for codes, the constant of the model that they are made of.
    """

    kind: Kind
    point: Point
    node: str
    index: int
    key: str | None
    value: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The quantized file that a model was made from.

    Attributes:
        graph: of the file.
        parts: what the stubs of the model know of it.
        kept: key of a constant of the model -> its key in the file, for those it has as they are.
    """

    graph: OnnxGraph
    parts: tuple[Part, ...]
    kept: dict[str, str]


def origin_of(model: WrappedModel) -> Origin | None:
    """Return the file that a model came from, None if it was float, or prepared anew since."""
    assert model.origin is None or isinstance(model.origin, Origin)
    return model.origin


def written_back(model: WrappedModel, origin: Origin) -> tuple[onnx.ModelProto, list[Piece]]:
    """Return the message of the file with what changed since, and its tensors.

    All that did not change is equal byte for byte. What several nodes of the file read as one
    tensor is one still, unless it became different for some of them: these read a new one.
    """
    return _WriteBack(model, origin).message()


class _WriteBack:
    def __init__(self, model: WrappedModel, origin: Origin) -> None:
        self.model, self.origin, self.graph = model, origin, origin.graph
        self.by_point: dict[Point, list[Part]] = defaultdict(list)
        for part in origin.parts:
            self.by_point[part.point].append(part)
        self.floats = changed_tensors(model)
        self.moved = {p: self._has_moved(p) for p in self.by_point if self._stub(p) is not None}

    def message(self) -> tuple[onnx.ModelProto, list[Piece]]:
        changed = {
            self.origin.kept[key]: tensor
            for key, tensor in self.floats.items()
            if key in self.origin.kept
        }
        rewired: dict[tuple[str, int], ir.TensorProtocol] = {}
        by_key: dict[str | None, list[Part]] = defaultdict(list)
        for part in self.origin.parts:
            by_key[part.key].append(part)
        for key, parts in by_key.items():
            self._write(key, parts, changed, rewired)
        return with_values(self.graph, changed, rewired)

    def _write(
        self,
        key: str | None,
        parts: Iterable[Part],
        changed: dict[str, ir.TensorProtocol],
        rewired: dict[tuple[str, int], ir.TensorProtocol],
    ) -> None:
        """Add the new values of one tensor of the file to ``changed``, or to ``rewired``."""
        groups: dict[tuple[int, bytes], list[Part]] = defaultdict(list)
        tensors: dict[tuple[int, bytes], ir.TensorProtocol] = {}
        for part in parts:
            tensor = self._new(part)
            if tensor is not None:
                data = int(tensor.dtype), tensor.tobytes()
                groups[data].append(part)
                tensors[data] = tensor
        readers = {(part.node, part.index) for found in groups.values() for part in found}
        overwrites = key is not None and self._is_only_read_by(key, readers)
        for data, found in groups.items():
            if overwrites and key is not None:
                changed[key], overwrites = tensors[data], False
            else:
                rewired |= {(part.node, part.index): tensors[data] for part in found}

    def _is_only_read_by(self, key: str, readers: set[tuple[str, int]]) -> bool:
        value = self.graph.values[key]
        uses = {(self.graph.node_key(use.node), use.idx) for use in value.uses()}
        return uses <= readers and not value.is_graph_output()

    # --- what changed ----------------------------------------------------------------------------

    def _stub(self, point: Point) -> Stub | None:
        stub = self.model.tap(point)
        return stub if isinstance(stub, Stub) else None

    def _has_moved(self, point: Point) -> bool:
        """Whether scale or zero point are others than in the file."""
        stub = self._stub(point)
        assert stub is not None
        qparams, held = stub.qparams, {part.kind: part for part in self.by_point[point]}
        if "scale" in held:
            scale = self._values(held["scale"])
        else:
            scale = self._values(held["inner_scale"]) * self._values(held["outer_scale"]).reshape(1)
        zeros = torch.zeros_like(qparams.zero_point, device="cpu")
        if "zero_point" in held and held["zero_point"].key is not None:
            zeros = self._values(held["zero_point"]).to(torch.int32)
        return not (
            torch.equal(qparams.scale.cpu(), scale.reshape(qparams.scale.shape))
            and torch.equal(qparams.zero_point.cpu(), zeros.reshape(qparams.zero_point.shape))
        )

    def _values(self, part: Part) -> Tensor:
        result: Tensor = to_torch(self._tensor(part)).to(torch.float32)
        return result

    def _tensor(self, part: Part) -> ir.TensorProtocol:
        """Return what the file holds there."""
        assert part.key is not None
        value = self.graph.values[part.key]
        node = value.producer()
        tensor = value.const_value if node is None else constant_tensor(node)
        assert tensor is not None
        return tensor

    # --- new values ------------------------------------------------------------------------------

    def _new(self, part: Part) -> ir.TensorProtocol | None:
        """Return what is to be in the file, None for what is there."""
        module = self.model.tap(part.point)
        if isinstance(module, BiasStub):
            return self._of_bias(part, module)
        assert isinstance(module, Stub)
        if part.kind == "codes":
            if part.value not in self.floats and not self.moved[part.point]:
                return None
            codes = quantize(self._stored(part), stored_qparams(module), module.grid)
            return self._differing(part, codes)
        if not self.moved[part.point]:
            return None
        qparams = stored_qparams(module)
        if part.kind == "zero_point":
            return self._new_zero_point(part, module, qparams)
        outer = outer_scale(qparams.scale) if part.kind != "scale" else qparams.scale
        inner = part.kind == "inner_scale"
        return self._differing(part, qparams.scale / outer if inner else outer)

    def _new_zero_point(self, part: Part, stub: Stub, qparams: QParams) -> ir.TensorProtocol | None:
        if part.key is not None:
            return self._differing(part, qparams.zero_point)
        if not bool(qparams.zero_point.any()):
            return None
        points = (
            qparams.zero_point if stub.spec.axis is not None else qparams.zero_point.reshape(())
        )
        kind = ir.DataType(stub.spec.dtype.onnx_type)
        return ir.tensor(as_array(points, kind), dtype=kind, name=f"{stub.name}_zero_point")

    def _of_bias(self, part: Part, stub: BiasStub) -> ir.TensorProtocol | None:
        assert isinstance(part.point, UsePoint)
        bias = plan_of(self.model).biases[part.point.node, part.point.index]
        plan = plan_of(self.model)
        sources = (plan.point_of(bias.activation), UsePoint(*bias.weight))
        moved = any(self._moved_at(point) for point in sources)
        if part.kind == "scale" and moved:
            return self._differing(part, stub.scale)
        if part.kind == "codes" and (moved or part.value in self.floats):
            return self._differing(part, stub.codes(self._stored(part)))
        return None

    def _moved_at(self, point: Point) -> bool:
        """Whether the stub on a point has moved, which may be known by another point it is on."""
        if point in self.moved:
            return self.moved[point]
        stub = self._stub(point)
        return any(self.moved[other] for other in self.moved if self._stub(other) is stub)

    def _stored(self, part: Part) -> Tensor:
        value = self.model.stored(part.value or "")
        assert value is not None
        return value.detach()

    def _differing(self, part: Part, values: Tensor) -> ir.TensorProtocol | None:
        """Return a tensor like that of the file with other values, None if they are the same."""
        old = self._tensor(part)
        array = as_array(values.reshape(tuple(old.shape.numpy())), old.dtype)
        new = ir.tensor(array, dtype=old.dtype, name=old.name)
        return None if new.tobytes() == old.tobytes() else new


def stored_qparams(stub: Stub) -> QParams:
    """Return the scale of a stub as its type can be stored, and its zero point."""
    qparams = stub.qparams
    scale = round_scale(qparams.scale, stub.spec).to(torch.float32)
    return QParams(scale, qparams.zero_point, qparams.axis, qparams.block_size)
