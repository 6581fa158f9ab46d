"""The digits network and its data, read from inside the package."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "calibration", "validation"]

_IMAGES, _LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
_HEADER = {_IMAGES: 16, _LABELS: 8}  # bytes of the IDX header before the first value
_SIDE = 28

# Image i belongs to the split that holds i mod 20: 7000, 500 and 2500 of the 10 000 images. The
# two halves of the file come from different groups of writers; every split takes from both.
_RESIDUES: dict[Split, range] = {
    "train": range(14),
    "calibration": range(14, 15),
    "validation": range(15, 20),
}


def model_path() -> Path:
    """Return the path of the float model, ``image: float32[N, 1, 28, 28] -> logits: [N, 10]``."""
    return Path(str(files("qwrap.demo") / "digits.onnx"))


def digits(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return images, float32[N, 1, 28, 28] in 0 … 1 (white on black), and labels, int64[N].

    Source: MNIST test set (LeCun, Cortes, Burges), CC BY-SA 3.0; see ``LICENCE-DATA.txt``.
    """
    images, labels = _values(_IMAGES).reshape(-1, 1, _SIDE, _SIDE), _values(_LABELS)
    chosen = np.isin(np.arange(len(labels)) % 20, _RESIDUES[split])
    return images[chosen].astype(np.float32) / np.float32(255), labels[chosen].astype(np.int64)


def batches(split: Split, batch_size: int = 50) -> list[dict[str, NDArray[np.float32]]]:
    """Return the images of ``split`` as batches ``{"image": float32[batch_size, 1, 28, 28]}``."""
    images, _ = digits(split)
    return [
        {"image": images[start : start + batch_size]} for start in range(0, len(images), batch_size)
    ]


def _values(name: str) -> NDArray[np.uint8]:
    content = gzip.decompress((files("qwrap.demo") / name).read_bytes())
    return np.frombuffer(content, np.uint8, offset=_HEADER[name])
