"""A file of statistics, as safetensors or as JSON."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qwrap.errors import StatisticsError
from qwrap.graph.save import replace_file
from qwrap.quant.statistics.entries import FORMAT, VERSION, count
from qwrap.quant.statistics.fingerprint import Fingerprint
from qwrap.quant.statistics.packed import read_packed, write_packed
from qwrap.quant.statistics.plain import read_plain, write_plain
from qwrap.quant.statistics.tensor import TensorStatistics


@dataclass(frozen=True, slots=True)
class Content:
    """All that a file holds.

    Attributes:
        batches: how many were run through the model.
        fingerprint: of that model.
        tensors: name -> what was seen.
    """

    batches: int
    fingerprint: Fingerprint
    tensors: dict[str, TensorStatistics]


def write(path: Path, content: Content) -> None:
    """Write a file, all of it or nothing; as JSON if its name ends in ``.json``.

    Raises:
        ExportError: the folder cannot be written to.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "batches": content.batches,
        "fingerprint": content.fingerprint.to_dict(),
    }
    form = write_plain if path.suffix.lower() == ".json" else write_packed
    replace_file(path, partial(form, header=header, tensors=content.tensors))


def read(path: Path) -> Content:
    """Read a file of either form.

    Nothing in it is executed, and nothing is made of a size that was not checked first.

    Raises:
        StatisticsError: it cannot be read, is damaged, of another kind or of a later version.
    """
    try:
        header, tensors = read_packed(path) if _has_tensors(path) else read_plain(path)
        batches = count(header.get("batches"), "batches")
        return Content(batches, Fingerprint.from_dict(header.get("fingerprint")), tensors)
    except OSError as error:
        raise StatisticsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}") from error


def _has_tensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file: with the length of a header in braces."""
    with path.open("rb") as file:
        start = file.read(9)
        size = os.fstat(file.fileno()).st_size
    return start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= size
