"""A folder of images as batches of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwrap.data.inputs import Batch, GraphInput
from qwrap.data.preprocessing import Preprocessing
from qwrap.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def find_images(folder: Path) -> list[Path]:
    """Return the image files below ``folder``, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def read_images(
    paths: Sequence[Path], preprocessing: Preprocessing, target: GraphInput
) -> Iterator[Batch]:
    """Yield every image as a batch of one for ``target``.

    Raises:
        InputError: Pillow is not installed, or a file is no image.
    """
    for path in paths:
        values = preprocessing.apply(_decode(path, preprocessing.channels))
        if target.dtype == np.uint8:
            values = values.round().clip(0, 255).astype(np.uint8)
        yield {target.name: values}


def _decode(path: Path, channels: str | None) -> Image:
    try:
        from PIL.Image import open as open_image
    except ImportError as error:
        raise InputError(
            f"{path}: reading images needs Pillow; run `pip install qwrap[images]`"
        ) from error
    try:
        with open_image(path) as image:
            decoded: Image = image.convert("L" if channels == "L" else "RGB")
            return decoded
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's own errors derive from these
        raise InputError(f"{path}: not a readable image ({error}); remove or repair it") from error
