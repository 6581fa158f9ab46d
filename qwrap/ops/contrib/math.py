"""Linear algebra, spectra, distances, hashing."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwrap.errors import UnsupportedOpError
from qwrap.ops.contrib.domain import microsoft
from qwrap.ops.limits import one_of


@microsoft("Inverse")
def inverse(X: Tensor) -> Tensor:
    """Invert matrices ``[..., n, n]``."""
    half = X.dtype in (torch.float16, torch.bfloat16)  # of which torch factorises none
    result: Tensor = torch.linalg.inv(X.float() if half else X)
    return result.to(X.dtype)


@microsoft("ComplexMul")
def complex_mul(A: Tensor, B: Tensor) -> Tensor:
    """Multiply complex numbers, kept as pairs along the last axis."""
    (a, b), (c, d) = A.unbind(-1), B.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), -1)


@microsoft("ComplexMulConj")
def complex_mul_conj(A: Tensor, B: Tensor) -> Tensor:
    """Multiply complex numbers, kept as pairs along the last axis, with conjugates."""
    (a, b), (c, d) = A.unbind(-1), B.unbind(-1)
    return torch.stack((a * c + b * d, b * c - a * d), -1)


FFT = {"normalized": one_of(0), "onesided": one_of(1), "signal_ndim": one_of(1, 2, 3)}


@microsoft("Rfft", allowed=FFT)
def rfft(X: Tensor, *, normalized: int = 0, onesided: int = 1, signal_ndim: int = 1) -> Tensor:
    """Transform the last ``signal_ndim`` axes; complex numbers are pairs along a new last axis."""
    del normalized, onesided
    return torch.view_as_real(torch.fft.rfftn(X, dim=list(range(-signal_ndim, 0))))


@microsoft("Irfft", allowed=FFT)
def irfft(X: Tensor, *, signal_ndim: int, normalized: int = 0, onesided: int = 1) -> Tensor:
    """Undo Rfft of a signal with an even number of elements."""
    del normalized, onesided
    axes = list(range(-signal_ndim, 0))
    signal: Tensor = torch.fft.irfftn(torch.view_as_complex(X.contiguous()), dim=axes)
    return signal


METRICS = one_of("euclidean", "sqeuclidean")  # the others are not in onnxruntime either


@microsoft("CDist", allowed={"metric": METRICS})
def cdist(A: Tensor, B: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    """Return the distances of each row of ``A`` to each row of ``B``."""
    squares = (A.unsqueeze(1) - B.unsqueeze(0)).square().sum(-1)
    return squares.sqrt() if metric == "euclidean" else squares


def _check_finite(*, isinf_only: int = 0, isnan_only: int = 0) -> None:
    if isinf_only and isnan_only:
        raise UnsupportedOpError("both isinf_only and isnan_only are set")


@microsoft("IsAllFinite", check=_check_finite)
def is_all_finite(*input: Tensor, isinf_only: int = 0, isnan_only: int = 0) -> Tensor:
    """Say whether no element of any input is infinite or NaN (or just one of both)."""
    bad = torch.isinf if isinf_only else torch.isnan if isnan_only else None
    good = [torch.isfinite(x) if bad is None else ~bad(x) for x in input]
    return torch.stack([g.all() for g in good]).all()


@microsoft("TorchEmbedding", host=(2,), ignored=("sparse",))
def torch_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int | None = None,
    scale_grad_by_freq: Tensor | None = None,
) -> Tensor:
    """Return rows of ``weight``; the two last inputs matter to a gradient only."""
    del scale_grad_by_freq
    keep = None if padding_idx is None or padding_idx < 0 else padding_idx
    return F.embedding(indices, weight, keep)


@microsoft("NGramRepeatBlock")
def n_gram_repeat_block(input_ids: Tensor, scores: Tensor, *, ngram_size: int) -> Tensor:
    """Set the score of each token to -inf that would repeat an n-gram of ``input_ids``."""
    length = input_ids.shape[1]
    if length < ngram_size:
        return scores
    windows = input_ids.unfold(1, ngram_size, 1)
    recent = input_ids[:, length - ngram_size + 1 :].unsqueeze(1)
    repeats = (windows[..., :-1] == recent).all(-1)
    banned = torch.zeros_like(scores, dtype=torch.int8)
    banned = banned.scatter_reduce(1, windows[..., -1], repeats.to(torch.int8), "amax")
    return scores.masked_fill(banned.bool(), float("-inf"))


@microsoft("MurmurHash3")
def murmur_hash_3(X: Tensor, *, positive: int = 1, seed: int = 0) -> Tensor:
    """Return the 32-bit hash of each element of ``X``.

    Source: Austin Appleby, MurmurHash3_x86_32.
    """
    if not isinstance(X, Tensor):  # texts
        values = [_murmur_of_words(*_words_of(text.encode()), seed) for text in np.ravel(X)]
        hashes = torch.stack(values).reshape(np.shape(X))
    else:
        raw = X.contiguous().view(torch.uint8).reshape(*X.shape, X.element_size())
        words = raw.view(torch.int32).long() & MASK
        hashes = _murmur_of_words(words, None, X.element_size(), seed)
    return hashes.to(torch.uint32) if positive else _signed(hashes)


MASK = 0xFFFFFFFF


def _signed(x: Tensor) -> Tensor:
    return (x - ((x >> 31) << 32)).to(torch.int32)


def _words_of(data: bytes) -> tuple[Tensor, Tensor | None, int]:
    """Return the whole 32-bit words of ``data``, the number the rest makes, and the length."""
    whole = len(data) // 4 * 4
    words = torch.tensor([int.from_bytes(data[i : i + 4], "little") for i in range(0, whole, 4)])
    tail = torch.tensor(int.from_bytes(data[whole:], "little")) if len(data) > whole else None
    return words.long(), tail, len(data)


def _rotated(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & MASK


def _times(x: Tensor, factor: int) -> Tensor:
    """Multiply modulo 2**32 in int64, which may wrap: the low bits stay right."""
    return (x * factor) & MASK


def _mixed(x: Tensor) -> Tensor:
    return _times(_rotated(_times(x, 0xCC9E2D51), 15), 0x1B873593)


def _murmur_of_words(words: Tensor, tail: Tensor | None, length: int, seed: int) -> Tensor:
    """Hash along the last axis of ``words``, which holds 32-bit numbers in int64."""
    h = torch.full_like(words[..., 0] if words.numel() else words.sum(), seed & MASK)
    for k in words.unbind(-1):
        h = (_times(_rotated(h ^ _mixed(k), 13), 5) + 0xE6546B64) & MASK
    if tail is not None:
        h = h ^ _mixed(tail)
    h = h ^ length
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = _times(h ^ (h >> shift), factor)
    return h ^ (h >> 16)
