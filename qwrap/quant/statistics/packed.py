"""Statistics as a few tensors: the safetensors form.

What all tensors have lies side by side, and the rest as JSON in the file's metadata::

    extremes             float32 [2, N]: low and high of N channels
    averages             float64 [2, N]: the moving averages of both
    counts.<bins>        int32 or int64 [M, 2 * bins + 1]: histograms with so many bins a side
    exponent.<bins>      int32 [M]

The entry of each tensor in the metadata says how many columns (``channels``) and rows (``rows``)
are its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qwrap.errors import StatisticsError
from qwrap.quant.statistics.entries import (
    FORMAT,
    RANGES,
    bins_of,
    checked_header,
    checked_tensor,
    count,
    entries,
    parsed,
    refuse,
    scalars,
)
from qwrap.quant.statistics.tensor import TensorStatistics


def write_packed(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, TensorStatistics]
) -> None:
    """Write a safetensors file."""
    listed = [_entry(name, tensor) for name, tensor in tensors.items()]
    metadata = {"format": FORMAT, "content": json.dumps({**header, "tensors": listed})}
    # Not save_file(), whose files nobody but their owner can read.
    path.write_bytes(safetensors.torch.save(_packed(tensors), metadata))


def _entry(name: str, tensor: TensorStatistics) -> dict[str, Any]:
    rows = 0 if tensor.counts is None else len(tensor.counts)
    return scalars(name, tensor) | {"channels": tensor.channels, "rows": rows}


def _packed(tensors: Mapping[str, TensorStatistics]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for key, dtype in RANGES.items():
        ranges = [getattr(tensor, key) for tensor in tensors.values()]
        packed[key] = torch.cat([torch.zeros(2, 0, dtype=dtype), *ranges], 1).contiguous()
    for bins in sorted({t.bins for t in tensors.values() if t.bins and t.counts is not None}):
        own = [t for t in tensors.values() if t.bins == bins]
        counts = torch.cat([t.counts for t in own if t.counts is not None])
        narrow = int(counts.max()) < 2**31
        packed[f"counts.{bins}"] = counts.to(torch.int32) if narrow else counts
        packed[f"exponent.{bins}"] = torch.cat([t.exponent for t in own if t.exponent is not None])
    return packed


def read_packed(path: Path) -> tuple[dict[str, Any], dict[str, TensorStatistics]]:
    """Read a safetensors file; return its header and what it says of each tensor.

    Raises:
        StatisticsError: it is damaged, of another kind or of a later version.
        OSError: it cannot be read.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise StatisticsError("holds no statistics of qwrap")
            header = checked_header(parsed(metadata.get("content", "")))
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except safetensors.SafetensorError as error:
        raise StatisticsError(f"is damaged: {error}; make it again") from error
    return header, dict(_unpacked(header, packed))


def _unpacked(
    header: Mapping[str, Any], packed: Mapping[str, Tensor]
) -> Iterator[tuple[str, TensorStatistics]]:
    pieces = _Pieces({
        key: tensor.T if key in RANGES and tensor.ndim == 2 else tensor
        for key, tensor in packed.items()
    })
    for name, entry in entries(header):
        channels = count(entry.get("channels"), f"channels of {name!r}")
        rows = count(entry.get("rows"), f"rows of {name!r}")
        bins = bins_of(entry, name)
        parts = {key: pieces.take(key, channels, (2,), kind).T for key, kind in RANGES.items()}
        if rows not in (0, channels) or (rows and bins is None):
            refuse(f"{name!r} has {rows} histograms")
        if bins is not None and rows:
            width = (2 * bins + 1,)
            counts = pieces.take(f"counts.{bins}", rows, width, torch.int64, torch.int32)
            parts["counts"] = counts.to(torch.int64)
            parts["exponent"] = pieces.take(f"exponent.{bins}", rows, (), torch.int32)
        yield name, checked_tensor(name, entry, **parts)
    if any(pieces.left.values()):
        refuse("it holds ranges or histograms of no tensor")


class _Pieces:
    """Hands out the rows of packed tensors, in order.

    Attributes:
        left: how many rows of each were not asked for yet.
    """

    def __init__(self, packed: Mapping[str, Tensor]) -> None:
        if any(tensor.ndim == 0 for tensor in packed.values()):
            refuse("a tensor has no dimension")
        self._packed = packed
        self.left = {key: len(tensor) for key, tensor in packed.items()}

    def take(self, key: str, rows: int, width: tuple[int, ...], *kinds: torch.dtype) -> Tensor:
        """Return a copy of the next ``rows`` rows, of shape ``width`` each."""
        tensor = self._packed.get(key)
        if tensor is None or tensor.dtype not in kinds or tuple(tensor.shape[1:]) != width:
            refuse(f"it has no {key} of {kinds[0]} and shape {['N', *width]}")
        if rows > self.left[key]:
            refuse(f"{key} has too few rows")
        start = len(tensor) - self.left[key]
        self.left[key] -= rows
        return tensor[start : start + rows].clone(memory_format=torch.contiguous_format)
