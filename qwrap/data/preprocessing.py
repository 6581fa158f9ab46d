"""How an image becomes a model input: resize, crop, scale, normalise; presets and files of it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwrap.data.inputs import GraphInput
from qwrap.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_CROP_RATIO = 0.875  # of the shorter side: 224 of 256, what most ImageNet pipelines keep


def _choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r}: choose one of {', '.join(map(repr, choices))}")


def _numbers(key: str, values: Any, counts: set[int]) -> None:
    numbers = isinstance(values, tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) not in counts:
        raise ConfigError(f"{key}={values!r}: give {' or '.join(map(str, sorted(counts)))} numbers")


def _pixels(key: str, values: Any, count: int) -> None:
    _numbers(key, (1,) * count if values is None else values, {count})
    if values is not None and not all(isinstance(v, int) and v > 0 for v in values):
        raise ConfigError(f"{key}={values!r}: give whole pixels, at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """From image to model input: resize, crop, ``(pixel * scale - mean) / std``, channels, layout.

    Attributes:
        size: height and width of the result (one number: square); None takes the model's.
        resize: ``"plain"`` resizes to ``size`` and ignores the aspect ratio; ``"shorter"`` resizes
            the shorter side to ``shorter`` and crops ``size`` from the centre.
        shorter: in pixels; None takes ``max(size) / 0.875``.
        scale: factor on the pixels, which are 0 … 255.
        mean: subtracted after ``scale``; one value, or one for each of ``channels`` in their order.
        std: divisor after ``mean``; likewise.
        channels: ``"RGB"``, ``"BGR"`` or ``"L"`` (luminance); None takes "L" for a model of one
            channel, else "RGB".
        layout: ``"NCHW"`` or ``"NHWC"``; None takes what the model's shape looks like.
    """

    size: tuple[int, int] | None = None
    resize: Literal["plain", "shorter"] = "plain"
    shorter: int | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Literal["RGB", "BGR", "L"] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None

    def __post_init__(self) -> None:
        _choice("resize", self.resize, ("plain", "shorter"))
        _choice("channels", self.channels, ("RGB", "BGR", "L", None))
        _choice("layout", self.layout, ("NCHW", "NHWC", None))
        _pixels("size", self.size, 2)
        _pixels("shorter", None if self.shorter is None else (self.shorter,), 1)
        if not isinstance(self.scale, int | float):
            raise ConfigError(f"scale={self.scale!r}: give a number")
        _numbers("mean", self.mean, {1, 3})
        _numbers("std", self.std, {1, 3})
        if 0.0 in self.std:
            raise ConfigError(f"std={list(self.std)}: a divisor of 0; give the deviations")
        if self.shorter is not None and self.size is not None and self.shorter < max(self.size):
            raise ConfigError(
                f"shorter={self.shorter} is less than size={list(self.size)}, "
                f"so there is nothing to crop from; raise it or use resize='plain'"
            )

    def fitted(self, target: GraphInput) -> Preprocessing:
        """Return these settings with what was left open taken from ``target``.

        Raises:
            InputError: ``target`` is not an image input, or leaves its size open as well.
        """
        shape = target.shape
        if shape is None or len(shape) != 4:
            raise InputError(f"input {target} is not an image (4 dimensions); give .npz files")
        last = shape[3] in {1, 3} and shape[1] not in {1, 3}
        layout = self.layout or ("NHWC" if last else "NCHW")
        count, height, width = (shape[i] for i in ((3, 1, 2) if layout == "NHWC" else (1, 2, 3)))
        size = self.size or (None if height is None or width is None else (height, width))
        if size is None:
            raise InputError(
                f"input {target} leaves the image size open; give it as `size` in a "
                f'preprocessing file, as in {{"preset": "imagenet", "size": 224}}'
            )
        channels = self.channels or ("L" if count == 1 else "RGB")
        return replace(self, size=size, channels=channels, layout=layout)

    def apply(self, image: Image) -> NDArray[np.float32]:
        """Return ``image`` ("RGB" or "L") as float32[1, C, H, W] or [1, H, W, C].

        The settings must be ``fitted``.
        """
        assert self.size is not None
        image = (
            self._cropped(image, *self.size)
            if self.resize == "shorter"
            else _resized(image, *self.size)
        )
        pixels = np.asarray(image, np.float32).reshape(*self.size, -1)
        if self.channels == "BGR":
            pixels = pixels[:, :, ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (pixels * np.float32(self.scale) - mean) / std
        values = values if self.layout == "NHWC" else values.transpose(2, 0, 1)
        return np.ascontiguousarray(values[None], np.float32)

    def _cropped(self, image: Image, height: int, width: int) -> Image:
        shorter = self.shorter or round(max(height, width) / _CROP_RATIO)
        ratio = shorter / min(image.size)
        image = _resized(image, round(image.height * ratio), round(image.width * ratio))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


PRESETS = {
    "unit": Preprocessing(),
    "tf": Preprocessing(scale=1 / 127.5, mean=(1.0,)),
    "raw": Preprocessing(scale=1.0),
    "imagenet": Preprocessing(
        resize="shorter", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels="RGB"
    ),
    "caffe": Preprocessing(
        resize="shorter", scale=1.0, mean=(103.939, 116.779, 123.68), channels="BGR"
    ),
}

_KEYS = tuple(field.name for field in fields(Preprocessing))


def read_preprocessing(name: str) -> Preprocessing:
    """Return the preset ``name``, or the settings in the JSON or TOML file of that name.

    A file holds the fields of ``Preprocessing`` that differ from the preset named by its key
    ``preset`` ("unit" where that is missing).

    Raises:
        ConfigError: neither exists, the file cannot be parsed, or it has keys that
            ``Preprocessing`` does not know.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"no preset or file {name!r}; choose one of {', '.join(PRESETS)}, or give a JSON or "
            f"TOML file with any of the keys preset, {', '.join(_KEYS)}"
        )
    settings = _parse(path)
    base = settings.pop("preset", "unit")
    if base not in PRESETS:
        raise ConfigError(f"{path}: no preset {base!r}; choose one of {', '.join(PRESETS)}")
    unknown = sorted(settings.keys() - set(_KEYS))
    if unknown:
        raise ConfigError(f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(_KEYS)}")
    try:
        return replace(
            PRESETS[base], **{key: _tuples(key, value) for key, value in settings.items()}
        )
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _resized(image: Image, height: int, width: int) -> Image:
    return image.resize((width, height), resample=2)  # 2 is Resampling.BILINEAR


def _tuples(key: str, value: Any) -> Any:
    """Return lists, and the numbers that stand for one, as the tuples of ``Preprocessing``."""
    if key == "size" and isinstance(value, int):
        return (value, value)
    if key in {"mean", "std"} and isinstance(value, int | float):
        return (float(value),)
    return tuple(value) if isinstance(value, list) else value


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        settings = _parse_toml(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:  # what the errors of both parsers and of UTF-8 derive from
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: holds a {type(settings).__name__}; expected keys and values")
    return settings


if sys.version_info >= (3, 11):
    import tomllib

    _parse_toml = tomllib.loads
else:

    def _parse_toml(text: str) -> dict[str, Any]:  # noqa: ARG001 - tomllib's signature
        raise ConfigError("reading TOML needs Python 3.11 or newer; write the settings as JSON")
