"""Images: cut to size, and decoded from files."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import InputError, ModelError
from qwrap.ops.limits import one_of
from qwrap.ops.registry import op
from qwrap.ops.window import torch_pads


def _check_axes(*, axes: Sequence[int] | None = None) -> None:
    if axes and len(set(axes)) < len(axes):
        raise ModelError(f"axes={list(axes)} names an axis twice")


@op("CenterCropPad", since=(18,), host=(1,), check=_check_axes)
def center_crop_pad(
    input_data: Tensor, shape: Sequence[int], *, axes: Sequence[int] | None = None
) -> Tensor:
    """Cut ``axes`` (default all) to ``shape``, or pad them with zeros, around their middle.

    An odd element is cut from, or put, behind.
    """
    rank = input_data.ndim
    before, after = [0] * rank, [0] * rank
    for axis, size in zip(range(rank) if axes is None else axes, shape, strict=True):
        missing = size - input_data.shape[axis]
        before[axis] = missing // 2 if missing > 0 else -(-missing // 2)
        after[axis] = missing - before[axis]
    return F.pad(input_data, torch_pads(before, after))


PIXELS = {"RGB": "RGB", "BGR": "RGB", "Grayscale": "L"}  # pixel_format -> mode of Pillow


@op("ImageDecoder", since=(20,), allowed={"pixel_format": one_of(*PIXELS)})
def image_decoder(encoded_stream: Tensor, *, pixel_format: str = "RGB") -> Tensor:
    """Decode a file (BMP, JPEG, JPEG 2000, TIFF, PNG, WebP, PNM) to ``uint8[height, width, C]``.

    Raises:
        InputError: Pillow is not installed, or knows no such file.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InputError(
            "ImageDecoder needs Pillow; install it with 'pip install pillow'"
        ) from error
    stream = io.BytesIO(encoded_stream.cpu().numpy().tobytes())
    try:
        with Image.open(stream) as image:
            pixels = np.array(image.convert(PIXELS[pixel_format]))
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"ImageDecoder: {error}") from error
    if pixel_format == "Grayscale":
        pixels = pixels[:, :, np.newaxis]
    elif pixel_format == "BGR":
        pixels = pixels[:, :, ::-1].copy()
    return torch.from_numpy(pixels).to(encoded_stream.device)
