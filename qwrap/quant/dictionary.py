"""A plan in the words of onnxruntime's ``TensorQuantOverrides``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType
from qwrap.errors import ConfigError
from qwrap.model.points import UsePoint
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import QParams
from qwrap.overrides import KEEPS_OUTPUT, TYPE_NAMES
from qwrap.quant.stubs import Stub

if TYPE_CHECKING:
    from qwrap.quant.plan import Conversion, QuantPlan, TensorPlan

Overrides = dict[str, list[dict[str, Any]]]
_NAMES = {name: member for member, name in TYPE_NAMES.items()}


def to_overrides(plan: QuantPlan, model: WrappedModel | None) -> Overrides:
    """Return what ``plan`` says of every tensor, see ``QuantPlan.to_overrides``."""
    found: Overrides = {}
    for key, tensor in plan.tensors.items():
        point = plan.point_of(tensor.source)
        if _follows(plan, key, model):
            said = {"quant_type": _quant_type(key, tensor.spec.dtype)}
        else:
            said = _said(key, tensor.spec, point, model)[0]
        if tensor.conversions:
            said["convert"] = _convert(key, tensor, model)
        found[key] = [said]
    for key, spec, point in _constants(plan, model):
        found[key] = _said(key, spec, point, model)
    return found


def _follows(plan: QuantPlan, key: str, model: WrappedModel | None) -> bool:
    """Whether a tensor has the scale of a named one, of floats, that it was moved from.

    With a scale said of it, it would be one by itself.
    """
    if model is None or plan.tensors[key].source == key:
        return False
    bases = {conversion.key: base for base, conversion in plan.conversions()}
    while plan.tensors[key].source != key:
        key = plan.tensors[key].source
        key = bases.get(key, key)
    writer = model.graph.values[key].producer()
    return writer is None or plan.nodes[model.graph.node_key(writer)].role in ("float", "weights")


def _convert(key: str, tensor: TensorPlan, model: WrappedModel | None) -> dict[str, Any]:
    if len(tensor.conversions) > 1:
        kinds = ", ".join(str(c.spec.dtype) for c in tensor.conversions)
        raise ConfigError(
            f"tensor {key!r} is converted to several types, {kinds}; onnxruntime's dictionary has "
            "room for one"
        )
    conversion = tensor.conversions[0]
    said = _said(key, conversion.spec, conversion.points[0], model)[0]
    return {**said, **_receivers(key, conversion, model)}


def _receivers(key: str, conversion: Conversion, model: WrappedModel | None) -> dict[str, set[str]]:
    """Return who reads a conversion; without the model, whether it is all readers is not known."""
    names = {node for node, _ in conversion.consumers}
    if model is None:
        return {"recv_nodes": names}
    value = model.graph.values[key]
    uses = [(model.graph.node_key(use.node), use.idx) for use in value.uses()]
    readers = {node for node, index in uses if UsePoint(node, index) in model.layout.points}
    if value.is_graph_output() and not conversion.outputs and names == readers:
        return {"recv_nodes": names | {KEEPS_OUTPUT}}
    return {} if names == readers else {"recv_nodes": names}


def _constants(
    plan: QuantPlan, model: WrappedModel | None
) -> Iterator[tuple[str, QuantSpec, UsePoint]]:
    """Yield constants once, as they are stored.

    Raises:
        ConfigError: one is stored in two ways, which the dictionary cannot say.
    """
    known: dict[str, tuple[QuantSpec, list[float]]] = {}
    for use, constant in plan.constants.items():
        point = UsePoint(*use)
        qparams = _qparams(point, model)
        scales = [] if qparams is None else [*qparams.scale.flatten().tolist()]
        stored = constant.spec, scales
        if known.setdefault(constant.value, stored) != stored:
            raise ConfigError(
                f"constant {constant.value!r} is stored once for each reader, in other types or "
                "scales; onnxruntime's dictionary has one word for both"
            )
        if known[constant.value] is stored:
            yield constant.value, constant.spec, point


def _qparams(point: Any, model: WrappedModel | None) -> QParams | None:
    if model is None:
        return None
    stub = model.tap(point)
    assert isinstance(stub, Stub)
    return stub.qparams


def _said(
    name: str, spec: QuantSpec, point: Any, model: WrappedModel | None
) -> list[dict[str, Any]]:
    """Return a dictionary for each channel, or one for all if scales are not known."""
    if spec.block_size is not None:
        raise ConfigError(
            f"constant {name!r} has scales in blocks of {spec.block_size}, of which onnxruntime's "
            "dictionary cannot tell"
        )
    said: dict[str, Any] = {"quant_type": _quant_type(name, spec.dtype)}
    if spec.axis is not None:
        said["axis"] = spec.axis
    qparams = _qparams(point, model)
    if qparams is None:
        said["symmetric"] = spec.symmetric
        return [{**said, "reduce_range": True} if spec.reduce_range else said]
    if spec.scale_type not in ("float32", "float16"):
        raise ConfigError(
            f"tensor {name!r} has scales of {spec.scale_type}; those of onnxruntime's dictionary "
            "are float32 or float16"
        )
    scales = _array(qparams.scale, np.dtype(spec.scale_type))
    zero_points = _array(qparams.zero_point, ir.DataType(spec.dtype.onnx_type).numpy())
    numbers = zip(scales, zero_points, strict=True)
    return [
        {**said, "scale": np.array(s, s.dtype), "zero_point": np.array(z, z.dtype)}
        for s, z in numbers
    ]


def _array(tensor: Any, kind: npt.DTypeLike) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy().reshape(-1).astype(kind)
    return array


def _quant_type(name: str, dtype: QuantType) -> Any:
    from onnxruntime.quantization import QuantType as Theirs  # slow to import, and rarely needed

    if dtype.name not in _NAMES:
        known = ", ".join(_NAMES)
        raise ConfigError(
            f"tensor {name!r} is of {dtype}, which onnxruntime's QuantType has not; it has {known}"
        )
    return Theirs[_NAMES[dtype.name]]
