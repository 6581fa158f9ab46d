"""Image operators against onnxruntime, the reference implementation and Pillow."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from qwrap import ops
from qwrap.errors import InputError

rng = np.random.default_rng(15)
X = rng.uniform(-1, 1, (2, 5, 4)).astype(np.float32)
CROPS = [([2, 3, 7], {}), ([3, 8], {"axes": [-2, 2]}), ([1, 2, 1], {}), ([4], {"axes": [0]})]


@pytest.mark.parametrize(("shape", "attributes"), CROPS)
def test_center_crop_pad_equals_onnxruntime(check, check_compiles, shape, attributes) -> None:
    check("CenterCropPad", 18, [X, np.array(shape)], attributes)
    check_compiles("CenterCropPad", 18, [torch.from_numpy(X), shape], attributes)


def test_the_gradient_of_center_crop_pad_is_cut_and_padded(check_random_gradients) -> None:
    check_random_gradients("CenterCropPad", 18, [(3, 4)], [[2, 7]])


PIXELS = rng.integers(0, 256, (6, 5, 3)).astype(np.uint8)
FORMATS = ["BMP", "JPEG", "JPEG2000", "TIFF", "PNG", "WEBP", "PPM"]
LOSSLESS = {"BMP", "TIFF", "PNG", "PPM"}


def encoded(image: Image.Image, file_format: str) -> np.ndarray:
    stream = io.BytesIO()
    image.save(stream, file_format)
    return np.frombuffer(stream.getvalue(), np.uint8).copy()


def decode(data: np.ndarray, pixel_format: str = "RGB") -> np.ndarray:
    operator = ops.find("", "ImageDecoder", 20)
    return operator.function(torch.from_numpy(data), pixel_format=pixel_format).numpy()


@pytest.mark.parametrize("file_format", FORMATS)
def test_decoded_pixels_equal_the_reference(check, file_format) -> None:
    data = encoded(Image.fromarray(PIXELS), file_format)
    for pixel_format in ("RGB", "BGR", "Grayscale"):
        check("ImageDecoder", 20, [data], {"pixel_format": pixel_format})
    if file_format in LOSSLESS:
        np.testing.assert_array_equal(decode(data), PIXELS)
        np.testing.assert_array_equal(decode(data, "BGR"), PIXELS[:, :, ::-1])


def test_any_kind_of_image_becomes_the_wanted_pixels() -> None:
    transparent = np.dstack((PIXELS, PIXELS[:, :, :1]))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(transparent), "PNG")), PIXELS)
    gray = decode(encoded(Image.fromarray(PIXELS[:, :, 0]), "PNG"))
    np.testing.assert_array_equal(gray, np.repeat(PIXELS[:, :, :1], 3, 2))


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(InputError, match="cannot identify image file"):
        decode(np.arange(9, dtype=np.uint8))
    with pytest.raises(InputError, match="truncated"):
        decode(encoded(Image.fromarray(PIXELS), "PNG")[:-40])


def test_without_pillow_the_error_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="needs Pillow"):
        decode(np.arange(9, dtype=np.uint8))
