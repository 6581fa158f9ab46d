"""The caches of a decoder in few bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch

from qwrap.config import QuantSpec
from qwrap.config.spec import ScaleType
from qwrap.dtypes import INT8, QuantType, quant_type
from qwrap.errors import ConfigError
from qwrap.graph.constants import Constants
from qwrap.graph.index import OnnxGraph, ValueType, opset_of
from qwrap.graph.load import Source, read_model
from qwrap.graph.opset import raise_opset
from qwrap.graph.save import check_target, write_model
from qwrap.kv_cache.cache import KVCache, KVCaches
from qwrap.kv_cache.codes import FEW_BITS, Code
from qwrap.kv_cache.detect import Asked, Pair, find_caches, other_caches
from qwrap.kv_cache.grids import Grids
from qwrap.kv_cache.layout import Granularity, check_granularity
from qwrap.kv_cache.observe import Run, Scales, observe
from qwrap.kv_cache.operators import reads_codes
from qwrap.kv_cache.rewrite import Rewriter
from qwrap.kv_cache.way import Way, native_way, way_of

TYPES = ("int8", "uint8", "int4", "uint4")
AXIS_OPSET, BITWISE_OPSET = 13, 18
_SCALE_TYPES: dict[ir.DataType, ScaleType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def quantize_kv_cache(
    source: Source,
    target: str | os.PathLike[str],
    batches: Iterable[Any] | None = None,
    *,
    dtype: str | QuantType = INT8,
    symmetric: bool = True,
    keys: Granularity | None = None,
    values: Granularity = "channel",
    caches: Sequence[Asked] | None = None,
    like: KVCaches | None = None,
    method: str = "minmax",
    chunk: int | None = None,
    external_data: bool | None = None,
    progress: bool = True,
) -> KVCaches:
    """Write a decoder whose key-value caches are codes of 8 or 4 bits, at its inputs and outputs.

    Graph inputs ``past…`` and outputs ``present…`` change their type, so that what the caller keeps
    and feeds back is a quarter or an eighth as large. Only new tokens are quantized: codes of the
    past travel as they are, or become the same codes again, so that nothing drifts however long a
    sequence grows. The current token reads what later ones will read, its codes, but for the form
    ``"requantized"``: there an operator reads it in float.

    Codes of 4 bits share a byte, uint8, two along the last axis of channels, which is half as long:
    onnxruntime takes no 4-bit tensors there. Those of the first half of the axis are in the lower
    bits, those of the second in the upper ones, and 8 is added to codes of int4. Where
    GroupQueryAttention reads codes itself, its neighbours share a byte instead.

    Args:
        source: path, message or onnx_ir model of a float32, float16 or bfloat16 decoder; never
            modified.
        target: file to make or replace.
        batches: data for the scales, mappings from graph input to array; caches that are left out
            are empty (or buffers of zeros), as before the first token, so that whole sequences
            will do. Not needed with ``like``.
        dtype: int8, uint8, int4 or uint4.
        symmetric: the middle code means 0; of int8 that is 0, so that buffers of zeros are as
            good as before. The only codes that GroupQueryAttention reads itself are int8 and int4
            with this.
        keys: whether the keys of one layer have one scale, ``"tensor"``, one for each ``"head"``,
            or one for each ``"channel"`` of each head. Where positions are rotated into keys, the
            range of a channel grows with the length of the sequences: for ``"channel"``, give
            batches as long as what will be run. None: by head, and with 4 bits, which it would
            ruin, by channel.
        values: the same of values, which do not know their positions.
        caches: which ones: patterns for names of graph inputs or outputs, or pairs of names, with
            None for one that is missing. None: all that are found.
        like: what another file of the same decoder got, so that each reads what the other writes:
            prompt and steps, or decoder and encoder, in files of their own.
        method: how ranges are chosen, as in ``qwrap.QConfig``.
        chunk: run so many tokens at a time, caches fed back, as a decoder needs that takes one
            token. None: run each batch once.
        external_data: write weights to ``<target>.data``; None does so if the source has external
            data or is too large for one file.
        progress: show a bar while data runs.

    Returns:
        What was quantized, and how.

    Raises:
        ModelError: the source cannot be loaded or run, or has no cache.
        ConfigError: an argument is none of these, or does not suit a cache.
        InputError: a batch does not fit.
        NotCalibratedError: no batch reached a cache.
        ExportError: the file cannot be written, or the model not be raised to the opset that its
            codes need: 13, with 4 bits 18.

    Source: Liu et al., arXiv:2402.02750, for keys by channel.
    """
    check_target(target)
    kind = quant_type(dtype)
    keys = keys or ("channel" if kind.bits <= FEW_BITS else "head")
    settings = _Settings(kind, symmetric, keys, values)
    if (batches is None) == (like is None):
        raise ConfigError("give batches, or like= with scales that are known, and not both")
    draft = read_model(source) if isinstance(source, ir.Model) else read_model(source).clone()
    needed = BITWISE_OPSET if settings.is_packed else AXIS_OPSET
    if opset_of(draft, "") < needed:
        raise_opset(draft, needed)
        version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", needed)])
        draft.ir_version = max(draft.ir_version, version)
    graph, constants = OnnxGraph(draft), Constants(draft)
    types = {value: graph.type_of(value) for value in graph.values.values()}
    grids = Grids(constants, lambda value: types.get(value, ValueType()))
    pairs = find_caches(graph, grids, caches)
    ways = [settings.way(pair, grids, pairs) for pair in pairs]
    specs = [settings.spec(pair) for pair in pairs]
    if like is None:
        others = other_caches(graph, grids, pairs)
        run = Run(batches or (), method, chunk, progress)
        scales = observe(graph, ways, specs, others, grids, run)
    else:
        scales = [_known(like, pair, settings) for pair in pairs]
    reports = [settings.report(*each) for each in zip(ways, specs, scales, strict=True)]
    rewriter = Rewriter(draft, constants, grids)
    for way, each in zip(ways, scales, strict=True):
        rewriter.rewrite(way, settings.code(way, each, graph.opset))
    write_model(draft, target, external_data=external_data)
    return KVCaches(tuple(reports))


class _Settings:
    """What was asked for."""

    def __init__(
        self, dtype: QuantType, symmetric: bool, keys: Granularity, values: Granularity
    ) -> None:
        if dtype.name not in TYPES:
            raise ConfigError(f"dtype={dtype.name!r}: choose one of {TYPES}")
        check_granularity("keys", keys)
        check_granularity("values", values)
        self.dtype, self._symmetric, self._keys, self._values = dtype, symmetric, keys, values

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.dtype.bits == FEW_BITS

    def granularity(self, pair: Pair) -> Granularity:
        """Return that of a cache; the finer one where it may hold keys or values."""
        if pair.role:
            return self._keys if pair.role == "key" else self._values
        order: tuple[Granularity, ...] = ("channel", "head", "tensor")
        return min(self._keys, self._values, key=order.index)

    def spec(self, pair: Pair) -> QuantSpec:
        """Return type and symmetry, and what scales are rounded to: the type that reads them."""
        scale_type = _SCALE_TYPES[pair.type.dtype or ir.DataType.FLOAT]
        return QuantSpec(dtype=self.dtype, symmetric=self._symmetric, scale_type=scale_type)

    def way(self, pair: Pair, grids: Grids, pairs: Sequence[Pair]) -> Way:
        """Return how the codes of a cache travel, one of all ``pairs``."""
        scaled = pair.layout.axes(self.granularity(pair), pair.name)
        if self._symmetric and self.dtype.signed and reads_codes(pair, pairs):
            return native_way(pair, scaled)
        packed = pair.layout.channels[-1] if self.is_packed else None
        if packed is not None and pair.type.shape is not None:
            _check_even(pair, pair.type.shape[packed])
        return way_of(pair, grids, scaled, packed)

    def code(self, way: Way, scales: Scales, opset: int) -> Code:
        """Return what its values and codes have to do with each other."""
        packed = None
        if self.is_packed:
            index = way.axes.index(way.pair.layout.channels[-1])
            size = scales.sizes[index]
            _check_even(way.pair, size)
            packed = index, size
        return Code(
            self.dtype,
            way.pair.type.dtype or ir.DataType.FLOAT,
            scales.scale.numpy(),
            scales.zero_point.numpy(),
            scales.sizes[: way.scaled],
            packed,
            math.prod(scales.sizes[way.scaled :]) if way.form == "operator" else 1,
            opset,
        )

    def report(self, way: Way, spec: QuantSpec, scales: Scales) -> KVCache:
        """Return what became of a cache."""
        pair = way.pair
        return KVCache(
            None if pair.past is None else pair.past.name,
            None if pair.present is None else pair.present.name,
            pair.role,
            spec,
            pair.layout,
            self.granularity(pair),
            way.form,
            scales.scale.numpy(),
            scales.zero_point.numpy(),
            scales.sizes,
        )


def _check_even(pair: Pair, size: int | str | None) -> None:
    if isinstance(size, int) and size % 2:
        raise ConfigError(
            f"cache {pair.name!r}: {size} channels cannot share bytes by twos; choose a type of 8 "
            "bits"
        )


def _known(like: KVCaches, pair: Pair, settings: _Settings) -> Scales:
    """Return the scales that another file of the decoder got for a cache."""
    name = next((v.name for v in pair.values if v.name in like), None)
    cache = like[name or pair.name]
    same = cache.spec == settings.spec(pair) and cache.granularity == settings.granularity(pair)
    if not same:
        raise ConfigError(
            f"like=: cache {pair.name!r} is {cache.spec.dtype} per {cache.granularity} there, and "
            f"{settings.dtype} per {settings.granularity(pair)} here; give the same arguments"
        )
    return Scales(torch.from_numpy(cache.scale), torch.from_numpy(cache.zero_point), cache.sizes)
