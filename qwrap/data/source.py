"""From what the user names (folder, file, function) to batches that can be read again and again."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from qwrap.data.arrays import SUFFIXES as ARRAY_SUFFIXES
from qwrap.data.arrays import find_arrays, read_arrays
from qwrap.data.images import SUFFIXES as IMAGE_SUFFIXES
from qwrap.data.images import find_images, read_images
from qwrap.data.inputs import Batch, GraphInput
from qwrap.data.preprocessing import Preprocessing
from qwrap.errors import ConfigError, InputError

DEFAULT_BATCH_SIZE = 16  # where the model leaves it open

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches that every iteration reads anew, so that memory holds one at a time."""

    read: Callable[[], Iterator[Any]]
    where: str

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in self.read():
            empty = False
            yield batch
        if empty:
            raise InputError(f"{self.where}: no samples; calibration needs a few hundred")


def open_data(
    source: str,
    inputs: Sequence[GraphInput],
    *,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> Batches:
    """Return the samples that ``source`` names as batches for ``inputs``.

    Args:
        source: a folder of images, an ``.npz`` or ``.npy`` file, a folder of these, or
            ``module:function`` (looked up from the current directory; called without arguments,
            returns an iterable of batches, which are passed on as they are).
        inputs: the graph inputs of the model.
        preprocessing: from image to input; images need it, nothing else takes it.
        limit: at most so many samples; of image files, spread evenly over the sorted paths. The
            last batch of a function is not cut.
        batch_size: samples in a batch; None takes the model's fixed one, else 16. Samples of
            unlike shapes never share a batch; an incomplete last batch is left out where the
            model's batch size is fixed.

    Raises:
        InputError: ``source`` does not exist, holds nothing of use, or does not fit ``inputs``.
        ConfigError: an argument contradicts ``source`` or the model.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: at least one sample is needed")
    if FUNCTION.fullmatch(source) and not Path(source).exists():
        _refuse(source, "batches of a function", preprocessing=preprocessing, batch_size=batch_size)
        function = find_function(source)
        return Batches(lambda: _limited(_called(function, source), limit), source)
    path = Path(source)
    images, arrays = _find_files(path)
    size = _batch_size(batch_size, inputs)
    if images:
        return _open_images(path, images, inputs, preprocessing, limit, size)
    _refuse(source, "arrays", preprocessing=preprocessing)
    return Batches(
        lambda: _fitting(read_arrays(arrays, inputs), inputs, source, size, limit), source
    )


def _open_images(
    path: Path,
    images: list[Path],
    inputs: Sequence[GraphInput],
    preprocessing: Preprocessing | None,
    limit: int | None,
    size: int,
) -> Batches:
    if len(inputs) != 1:
        names = ", ".join(map(str, inputs))
        raise InputError(f"{path}: images fit a model with one input; this has {names}; give .npz")
    if preprocessing is None:
        raise ConfigError(
            f"{path}: a folder of images needs to know how the model wants them; give a preset "
            f"(--preset imagenet, unit, tf, raw, caffe) or a preprocessing file"
        )
    fitted = preprocessing.fitted(inputs[0])
    count = min(limit or len(images), len(images))
    chosen = [images[i * len(images) // count] for i in range(count)]
    where = str(path)
    return Batches(
        lambda: _fitting(read_images(chosen, fitted, inputs[0]), inputs, where, size, None), where
    )


def _find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the image files and the array files that ``path`` stands for; one list is empty."""
    if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        return [], [path]
    if path.is_file():
        raise InputError(
            f"{path}: a {path.suffix or 'nameless'} file; give .npz, .npy or a folder of images"
        )
    if not path.is_dir():
        raise InputError(
            f"{path}: no such file or folder; give a folder of images, .npz or .npy files, "
            f"or module:function"
        )
    images, arrays = find_images(path), find_arrays(path)
    if images and arrays:
        raise InputError(
            f"{path}: holds {len(images)} images and {len(arrays)} array files; keep one kind"
        )
    if not images and not arrays:
        held = sorted({p.suffix or p.name for p in path.iterdir()})[:8]
        wanted = ", ".join(sorted(IMAGE_SUFFIXES | ARRAY_SUFFIXES))
        raise InputError(f"{path}: holds {', '.join(held) or 'nothing'}; expected {wanted}")
    return images, arrays


def _batch_size(asked: int | None, inputs: Sequence[GraphInput]) -> int:
    fixed = [wanted.shape[0] for wanted in inputs if wanted.shape and wanted.shape[0] is not None]
    if asked is not None and asked < 1:
        raise ConfigError(f"batch_size={asked}: at least one sample is needed")
    if asked is not None and fixed and asked != fixed[0]:
        raise ConfigError(
            f"batch_size={asked}: the model's is fixed at {fixed[0]}; leave the option out"
        )
    return asked or (fixed[0] if fixed else DEFAULT_BATCH_SIZE)


def _fitting(
    batches: Iterator[Batch],
    inputs: Sequence[GraphInput],
    where: str,
    size: int,
    limit: int | None,
) -> Iterator[Batch]:
    """Yield ``batches`` cut and joined to ``size`` samples, in the dtypes of ``inputs``."""
    samples = islice(_samples(batches), limit)
    for shapes, group in groupby(samples, key=_shapes):
        while chunk := list(islice(group, size if shapes else 1)):
            if shapes and len(chunk) < size and _is_fixed(inputs):
                break  # the model takes no smaller batch
            yield {
                wanted.name: wanted.convert(
                    np.concatenate([sample[wanted.name] for sample in chunk])
                    if len(chunk) > 1
                    else chunk[0][wanted.name],
                    where,
                )
                for wanted in inputs
            }


def _samples(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield samples one by one; a batch whose arrays share no first axis counts as one."""
    for batch in batches:
        lengths = {len(array) if array.ndim else None for array in batch.values()}
        length = lengths.pop()
        if lengths or length is None:
            yield batch
            continue
        for i in range(length):
            yield {name: array[i : i + 1] for name, array in batch.items()}


def _shapes(sample: Batch) -> tuple[tuple[int, ...], ...]:
    """Return what samples must share to be joined; empty if this one can join no other."""
    shapes = tuple(array.shape for array in sample.values())
    return shapes if all(shape and shape[0] == 1 for shape in shapes) else ()


def _is_fixed(inputs: Sequence[GraphInput]) -> bool:
    return any(wanted.shape and wanted.shape[0] is not None for wanted in inputs)


def find_function(source: str) -> Callable[..., object]:
    """Return what ``module:function`` names, looked up from the current directory.

    Raises:
        InputError: there is no such module or function.
    """
    module, _, name = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's module lies where they stand
    try:
        function = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{source}: {error}; the module is looked up from the current directory"
        ) from error
    except AttributeError as error:
        raise InputError(f"{source}: {module} has no function {name!r}") from error
    if not callable(function):
        raise InputError(f"{source}: {name!r} is a {type(function).__name__}, not a function")
    found: Callable[..., object] = function
    return found


def _called(function: Callable[[], object], source: str) -> Iterator[Any]:
    found = function()
    if not isinstance(found, Iterable):
        raise InputError(
            f"{source}: returned a {type(found).__name__}; expected an iterable of batches"
        )
    return iter(found)


def _limited(batches: Iterator[Any], limit: int | None) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        yield batch
        seen += _count(batch)
        if limit is not None and seen >= limit:
            return


def _count(batch: Any) -> int:
    """Return the length of the first axis of the first array in ``batch``."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list):
        batch = next(iter(batch), None)
    shape = tuple(getattr(batch, "shape", ()))
    return int(shape[0]) if shape else 1


def _refuse(source: str, kind: str, **settings: object) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ConfigError(f"{source}: {kind} take no {' or '.join(given)}; leave it out")
