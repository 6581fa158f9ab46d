"""Calls of the functions that ``export`` writes for types which ONNX has no operators for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import QuantType, codebook_type, quant_type
from qwrap.errors import ConfigError
from qwrap.export.functions import DOMAIN, dequantizer, fake_quantizer
from qwrap.export.write_back import Kind
from qwrap.graph.index import ValueType
from qwrap.graph.nodes import QUANTIZED_AS
from qwrap.importing.reading import Reading, Source, UnreadableError, as_floats, constant_of
from qwrap.model.values import constant_tensor
from qwrap.numerics import QParams

NAME = re.compile(
    r"(?P<what>FakeQuantize|Dequantize)(?P<of>\w+?)(?P<real>Of(Float16|Bfloat16))?(_\d+)?"
)
KINDS: Mapping[int, Kind] = MappingProxyType({1: "scale", 2: "zero_point"})
FAKE_QUANTIZE = "FakeQuantize"


def is_call(node: ir.Node | None, what: str = "") -> bool:
    """Whether a node calls such a function, one called ``what`` perhaps."""
    return (
        node is not None
        and node.domain == DOMAIN
        and NAME.fullmatch(node.op_type) is not None
        and node.op_type.startswith(what)
    )


def read_call(node: ir.Node, model: ir.Model, kind: ValueType) -> Reading:
    """Return how the function that ``node`` calls makes reals of its first input.

    Args:
        node: ``is_call`` holds for it.
        model: has the function.
        kind: what is known of that input.

    Raises:
        UnreadableError: the function is not as ``export`` writes it, or its scales are not stored.
    """
    found = NAME.fullmatch(node.op_type)
    function = model.functions.get(node.op_identifier())
    assert found is not None
    if function is None:
        raise UnreadableError(f"its function {node.op_type!r} is missing")
    real = _real(found, kind)
    dtype = _dtype(node, function, found["of"])
    make = fake_quantizer if found["what"] == FAKE_QUANTIZE else dequantizer
    expected = make(dtype, real, function.opset_imports.get("", 1), function.name)
    if ir.to_proto(expected).node != ir.to_proto(function).node:
        raise UnreadableError(f"its function {node.op_type!r} is not as qwrap writes it")
    scale, axis, block_size = _spread(node, 1)
    zeros, sources = torch.zeros_like(scale), [_source(node, 1)]
    if len(node.inputs) > 2:
        zeros, sources = _spread(node, 2)[0], [*sources, _source(node, 2)]
    zero_point = zeros.to(torch.int32)
    symmetric = bool((zero_point == (0 if dtype.signed else 2 ** (dtype.bits - 1))).all())
    spec = QuantSpec(dtype=dtype, symmetric=symmetric, axis=axis, block_size=block_size)
    return Reading(spec, QParams(scale, zero_point, axis, block_size), real, tuple(sources))


def _real(found: re.Match[str], kind: ValueType) -> ir.DataType:
    """Return the type of the reals: of what a FakeQuantize reads, else what the name says."""
    if found["what"] == FAKE_QUANTIZE and kind.dtype is not None:
        return kind.dtype
    return ir.DataType[(found["real"] or "OfFloat").removeprefix("Of").upper()]


def _dtype(node: ir.Node, function: ir.Function, suffix: str) -> QuantType:
    """Return the type that a function rounds to."""
    name = node.metadata_props.get(QUANTIZED_AS, suffix[:1].lower() + suffix[1:])
    levels = [n for n in function if n.op_type == "Constant" and n.outputs[0].name == "levels"]
    try:
        if levels:
            return codebook_type(name, constant_tensor(levels[0]).numpy().tolist())
        return quant_type(name)
    except ConfigError as error:
        raise UnreadableError(str(error)) from error


def _source(node: ir.Node, index: int) -> Source:
    """Return where a scale or zero point is stored, behind what repeats it for each block."""
    value = node.inputs[index]
    gather = None if value is None else value.producer()
    if gather is not None and gather.op_type == "Gather":
        return Source(gather, 0, gather.inputs[0], KINDS[index])
    return Source(node, index, value, KINDS[index])


def _spread(node: ir.Node, index: int) -> tuple[torch.Tensor, int | None, int | None]:
    """Return scales or zero points as stubs have them, with axis and block size.

    Raises:
        UnreadableError: they are not stored.
    """
    source = _source(node, index)
    tensor = constant_of(source.value)
    if tensor is None:
        raise UnreadableError("its scale is computed while the model runs")
    values = as_floats(tensor)
    if source.node is not node:
        return values, *_blocks(source.node)
    axes = [i for i, size in enumerate(values.shape) if size > 1]
    if len(axes) > 1:
        raise UnreadableError(f"its scale has shape {list(values.shape)}")
    return values.reshape(-1), axes[0] if axes else None, None


def _blocks(gather: ir.Node) -> tuple[int, int]:
    index = constant_of(gather.inputs[1])
    if index is None:
        raise UnreadableError("its scale is computed while the model runs")
    numbers = index.numpy()
    size = int((numbers == 0).sum())
    if size == 0 or not np.array_equal(numbers, np.arange(len(numbers)) // size):
        raise UnreadableError("its scales are not those of blocks of one size")
    attribute = gather.attributes.get("axis")
    return 0 if attribute is None else attribute.as_int(), size
