"""``.npz`` and ``.npy`` files as batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qwrap.data.inputs import Array, Batch, GraphInput, shape_text
from qwrap.errors import InputError

SUFFIXES = frozenset({".npy", ".npz"})

# What numpy raises on broken files; TypeError where a .npz is a single .npy array.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def find_arrays(folder: Path) -> list[Path]:
    """Return the array files directly in ``folder``, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_arrays(paths: Sequence[Path], inputs: Sequence[GraphInput]) -> Iterator[Batch]:
    """Yield the batches in the files, one file in memory at a time.

    An array of an input's own rank is one batch. One dimension more: the first counts batches.
    One dimension less: a single sample without its batch dimension. All inputs of a file follow
    the same of these three rules. Arrays beyond the inputs, such as labels, are ignored.

    Raises:
        InputError: a file cannot be read without unpickling, lacks an input, or its arrays do not
            fit; the message names the file and what it holds.
    """
    for path in paths:
        yield from _batches(path, _chosen(path, _load(path), inputs), inputs)


def _load(path: Path) -> dict[str, Array]:
    try:
        if path.suffix.lower() == ".npy":
            return {"": np.lib.format.open_memmap(path, mode="r")}  # refuses pickled objects
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: not a readable {path.suffix} file ({error}); write it with numpy.savez, "
            f"one array of numbers for each graph input"
        ) from error


def _chosen(path: Path, arrays: dict[str, Array], inputs: Sequence[GraphInput]) -> dict[str, Array]:
    """Return one array for each input: by name, or the only array for the only input."""
    if len(arrays) == len(inputs) == 1:
        return {inputs[0].name: next(iter(arrays.values()))}
    missing = [str(wanted) for wanted in inputs if wanted.name not in arrays]
    if missing:
        held = ", ".join(
            f"{name!r} {array.dtype}{shape_text(array.shape)}" if name else "one unnamed array"
            for name, array in arrays.items()
        )
        raise InputError(
            f"{path}: no array for {', '.join(missing)}; it holds {held or 'nothing'}; "
            f"name the arrays in the .npz after the graph inputs"
        )
    return {wanted.name: arrays[wanted.name] for wanted in inputs}


def _batches(path: Path, arrays: dict[str, Array], inputs: Sequence[GraphInput]) -> Iterator[Batch]:
    extra = {_extra_dimensions(path, arrays[wanted.name], wanted) for wanted in inputs}
    if len(extra) > 1:
        raise InputError(
            f"{path}: some arrays have a sample dimension more than their input and some have "
            f"not; give all of them one, or none"
        )
    rank = extra.pop()
    if rank == 1:
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"{path}: arrays hold different numbers of samples: {counts}")
        for i in range(min(counts.values())):
            yield {name: array[i] for name, array in arrays.items()}
    else:
        yield {name: array if rank == 0 else array[None] for name, array in arrays.items()}


def _extra_dimensions(path: Path, array: Array, wanted: GraphInput) -> int:
    extra = 0 if wanted.shape is None else array.ndim - len(wanted.shape)
    if abs(extra) > 1:
        raise InputError(
            f"{path}: input {wanted.name!r} got an array of shape {shape_text(array.shape)}; "
            f"the model takes {shape_text(wanted.shape)}"
        )
    return extra
