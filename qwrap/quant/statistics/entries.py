"""The entry of each tensor in a file of statistics, in either form: what it may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch

from qwrap.errors import StatisticsError
from qwrap.quant.statistics.tensor import TensorStatistics

FORMAT, VERSION = "qwrap.statistics", 1
RANGES = {"extremes": torch.float32, "averages": torch.float64}
SCALARS = ("count", "masked", "nonfinite", "batches")
LARGEST_BINS = 2**16
LARGEST_COUNT = 2**63
LARGEST_AXIS = 64
LONGEST = 40  # characters of a value in a message


def refuse(what: str) -> NoReturn:
    """Raise the error of a damaged file."""
    raise StatisticsError(f"is damaged: {what}; make it again")


def parsed(text: str | bytes) -> Any:
    """Return JSON, without numbers that are none.

    Raises:
        StatisticsError: it is no JSON.
    """

    def no_number(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"is neither a safetensors nor a JSON file ({error})") from error


def checked_header(content: Any) -> dict[str, Any]:
    """Return the header, if it is of this kind of file and of a version that is known.

    Raises:
        StatisticsError: it is not.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StatisticsError("holds no statistics of qwrap")
    version = count(content.get("version"), "version")
    if version > VERSION:
        raise StatisticsError(
            f"was written by a later qwrap (version {version} of the form; this one reads up to "
            f"{VERSION}); update qwrap"
        )
    return content


def count(value: Any, what: str) -> int:
    """Return ``value``, if it is a number of things."""
    if type(value) is not int or not 0 <= value < LARGEST_COUNT:
        refuse(f"{what} is {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return ``value`` for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def entries(header: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entries of tensors with their names, of which no two are equal."""
    found, names = header.get("tensors"), set()
    if not isinstance(found, list):
        refuse("it has no list of tensors")
    for entry in found:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in names:
            refuse(f"a tensor has the name {shown(name)}, or two have")
        names.add(name)
        yield name, entry


def bins_of(entry: Mapping[str, Any], name: str) -> int | None:
    """Return the bins on each side of a tensor's histograms, None if it has none."""
    if entry.get("bins") is None:
        return None
    bins = count(entry["bins"], f"bins of {name!r}")
    if bins < 1 or bins & (bins - 1) or bins > LARGEST_BINS:
        refuse(f"{name!r} has histograms of {bins} bins")
    return bins


def scalars(name: str, tensor: TensorStatistics) -> dict[str, Any]:
    """Return what an entry begins with."""
    return {"name": name} | {key: getattr(tensor, key) for key in ("axis", *SCALARS, "bins")}


def checked_tensor(name: str, entry: Mapping[str, Any], **parts: Any) -> TensorStatistics:
    """Return what an entry and its ``parts`` (ranges and histograms) say, if it can be that."""
    axis = entry.get("axis")
    if axis is not None and (type(axis) is not int or abs(axis) > LARGEST_AXIS):
        refuse(f"{name!r} has the axis {shown(axis)}")
    for key in SCALARS:
        parts[key] = count(entry.get(key), f"{key} of {name!r}")
    tensor = TensorStatistics(axis=axis, bins=bins_of(entry, name), **parts)
    problem = tensor.problem()
    if problem:
        refuse(f"{name!r}: {problem}")
    return tensor
