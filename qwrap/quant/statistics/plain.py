"""Statistics as text: the JSON form.

The entry of each tensor holds its ranges as lists of numbers, with null for a channel that had no
value, and of each histogram the bins from the first to the last one in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwrap.quant.statistics.entries import (
    RANGES,
    bins_of,
    checked_header,
    checked_tensor,
    count,
    entries,
    parsed,
    refuse,
    scalars,
    shown,
)
from qwrap.quant.statistics.tensor import EMPTY, TensorStatistics

LARGEST_HISTOGRAMS = 2**32  # bytes in memory; a few lines of text could ask for more
LARGEST_EXPONENT = 2**16


def write_plain(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, TensorStatistics]
) -> None:
    """Write a JSON file."""
    listed = [_entry(name, tensor) for name, tensor in tensors.items()]
    text = json.dumps({**header, "tensors": listed}, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _entry(name: str, tensor: TensorStatistics) -> dict[str, Any]:
    ranges = {key: [_plain_end(e) for e in getattr(tensor, key).tolist()] for key in RANGES}
    return scalars(name, tensor) | ranges | {"histogram": _plain_rows(tensor)}


def _plain_end(end: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in end]


def _plain_rows(tensor: TensorStatistics) -> list[dict[str, Any]]:
    if tensor.counts is None or tensor.exponent is None:
        return []
    rows = []
    for counts, exponent in zip(tensor.counts, tensor.exponent.tolist(), strict=True):
        used = counts[:-1].nonzero().flatten()
        start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        rows.append({
            "exponent": exponent,
            "start": start,
            "counts": counts[start:stop].tolist(),
            "zeros": int(counts[-1]),
        })
    return rows


def read_plain(path: Path) -> tuple[dict[str, Any], dict[str, TensorStatistics]]:
    """Read a JSON file; return its header and what it says of each tensor.

    Raises:
        StatisticsError: it is damaged, of another kind or of a later version.
        OSError: it cannot be read.
    """
    header = checked_header(parsed(path.read_bytes()))
    tensors, size = {}, 0
    for name, entry in entries(header):
        bins, rows = bins_of(entry, name), entry.get("histogram")
        parts: dict[str, Any] = {
            key: _range(entry.get(key), name, dtype) for key, dtype in RANGES.items()
        }
        channels = parts["extremes"].shape[1]
        is_list = isinstance(rows, list) and len(rows) in (0, channels)
        if not is_list or parts["averages"].shape[1] != channels:
            refuse(f"{name!r} has not one range, average and histogram for each channel")
        if rows:
            size += len(rows) * (2 * (bins or 0) + 1) * 8
            if bins is None or size > LARGEST_HISTOGRAMS:
                refuse(f"{name!r} has {len(rows)} histograms of {bins} bins")
            parts["counts"], parts["exponent"] = _histograms(rows, bins, name)
        tensors[name] = checked_tensor(name, entry, **parts)
    return header, tensors


def _range(ends: Any, name: str, dtype: torch.dtype) -> Tensor:
    """Return the ends of every channel, ``[2, C]``; null is what an end is without a value."""
    if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(e, list) for e in ends):
        refuse(f"{name!r} has a range that is not two lists")
    kinds = (float, int, type(None))
    if len(ends[0]) != len(ends[1]) or any(type(v) not in kinds for end in ends for v in end):
        refuse(f"{name!r} has a range that is not two lists of as many numbers")
    known = [[EMPTY[i] if v is None else v for v in end] for i, end in enumerate(ends)]
    try:
        return torch.from_numpy(np.array(known, np.float64)).to(dtype)
    except OverflowError:
        refuse(f"{name!r} has a range that no type of numbers holds")


def _histograms(rows: list[Any], bins: int, name: str) -> tuple[Tensor, Tensor]:
    """Return counts and exponents of the rows."""
    counts = torch.zeros(len(rows), 2 * bins + 1, dtype=torch.int64)
    exponent = torch.zeros(len(rows), dtype=torch.int32)
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("counts"), list):
            refuse(f"{name!r} has a histogram without counts")
        values, start = row["counts"], count(row.get("start"), f"start of {name!r}")
        if start + len(values) > 2 * bins:
            refuse(f"{name!r} has a histogram of more than {2 * bins} bins")
        counts[i, start : start + len(values)] = _integers(values, name)
        counts[i, -1] = count(row.get("zeros"), f"zeros of {name!r}")
        power = row.get("exponent")
        if type(power) is not int or abs(power) > LARGEST_EXPONENT:
            refuse(f"{name!r} has a histogram of exponent {shown(power)}")
        exponent[i] = power
    return counts, exponent


def _integers(values: list[Any], name: str) -> Tensor:
    if any(type(value) is not int for value in values):
        refuse(f"{name!r} has counts that are no integers")
    try:
        return torch.from_numpy(np.array(values, np.int64))
    except OverflowError:
        refuse(f"{name!r} has counts beyond 64 bits")
