"""Signal processing: Fourier transforms, window functions and the mel scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwrap.ops.element_types import torch_dtype
from qwrap.ops.registry import op

Count = int | Sequence[int]  # a scalar, which some exporters write as a list of one


def _number(value: Count) -> int:
    (number,) = value if isinstance(value, Sequence) else (value,)
    return number


def _signal(x: Tensor) -> Tensor:
    """Return the numbers whose last axis holds a real part, or a real and an imaginary one."""
    x = x.float() if x.itemsize < 4 else x  # torch transforms no half precision on the CPU
    return x.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())


def _pairs(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum.resolve_conj())


@op("DFT", since=(20,), host=(1, 2))
def dft(
    input: Tensor,
    dft_length: Count | None = None,
    axis: Count = -2,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Return the Fourier transform along ``axis``, complex numbers as pairs on the last axis.

    With ``onesided`` the transform of a real signal leaves out what is conjugate, and the inverse
    of such a one is real.
    """
    dim = _number(axis) % input.ndim
    signal = _signal(input)
    n = None if dft_length is None else _number(dft_length)
    if inverse and onesided:
        real: Tensor = torch.fft.irfft(signal, n, dim)
        return real.unsqueeze(-1).to(input.dtype)
    if inverse:
        return _pairs(torch.fft.ifft(signal, n, dim)).to(input.dtype)
    return _forward(signal, n, dim, onesided).to(input.dtype)


def _forward(signal: Tensor, n: int | None, dim: int, onesided: int) -> Tensor:
    """Return the transform as pairs, its first half and the middle if ``onesided``."""
    if onesided and not signal.is_complex():
        return _pairs(torch.fft.rfft(signal, n, dim))
    spectrum: Tensor = torch.fft.fft(signal, n, dim)
    if onesided:
        spectrum = spectrum.narrow(dim, 0, spectrum.shape[dim] // 2 + 1)
    return _pairs(spectrum)


@op("DFT", since=(17,), host=(1,))
def dft_17(
    input: Tensor,
    dft_length: Count | None = None,
    *,
    axis: int = 1,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Return the Fourier transform along ``axis``."""
    return dft(input, dft_length, axis, inverse=inverse, onesided=onesided)


@op("STFT", since=(17,), host=(1, 3))
def stft(
    signal: Tensor,
    frame_step: Count,
    window: Tensor | None = None,
    frame_length: Count | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Return the Fourier transforms of windows of ``[batch, time, 1 or 2]``, one per step."""
    samples = _signal(signal)
    if frame_length is not None:
        size = _number(frame_length)
    else:
        size = samples.shape[1] if window is None else window.shape[0]
    frames = samples.unfold(1, size, _number(frame_step))  # [batch, frame, time]
    if window is not None:
        frames = frames * window
    return _forward(frames, None, 2, onesided).to(signal.dtype)


def _cosines(
    size: Count,
    periodic: int,
    output_datatype: int,
    device: torch.device | None,
    coefficients: Sequence[float],
) -> Tensor:
    """Return the sum of ``coefficients[k] * cos(2 pi k n / N)``, the window of a symmetric filter.

    A periodic one is the beginning of a symmetric one that is longer by one.
    """
    count = _number(size)
    angle = torch.arange(count, dtype=torch.float64, device=device)
    angle = angle * (2 * math.pi) / (count if periodic else count - 1)
    total = torch.zeros_like(angle)
    for k, coefficient in enumerate(coefficients):
        total = total + coefficient * torch.cos(k * angle)
    return total.to(torch_dtype(output_datatype))


@op("HannWindow", since=(17,), host=(0,))
def hann_window(
    size: Count,
    *,
    output_datatype: int = 1,
    periodic: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Return a raised cosine."""
    return _cosines(size, periodic, output_datatype, device, (0.5, -0.5))


@op("HammingWindow", since=(17,), host=(0,))
def hamming_window(
    size: Count,
    *,
    output_datatype: int = 1,
    periodic: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Return a cosine raised less than to touch zero."""
    return _cosines(size, periodic, output_datatype, device, (25 / 46, -21 / 46))


@op("BlackmanWindow", since=(17,), host=(0,))
def blackman_window(
    size: Count,
    *,
    output_datatype: int = 1,
    periodic: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Return a sum of two cosines."""
    return _cosines(size, periodic, output_datatype, device, (0.42, -0.5, 0.08))


@op("MelWeightMatrix", since=(17,), host=(0, 1, 2, 3, 4))
def mel_weight_matrix(
    num_mel_bins: int,
    dft_length: int,
    sample_rate: int,
    lower_edge_hertz: float,
    upper_edge_hertz: float,
    *,
    output_datatype: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Return the triangular filters ``[dft_length // 2 + 1, num_mel_bins]``, peaks of one.

    The corners are evenly spaced on the mel scale, ``2595 log10(1 + f / 700)``, and cut to whole
    bins of the spectrum.
    """
    low, high = (2595 * math.log10(1 + f / 700) for f in (lower_edge_hertz, upper_edge_hertz))
    corner = torch.arange(num_mel_bins + 2, dtype=torch.float64, device=device)
    mel = corner * ((high - low) / (num_mel_bins + 2)) + low
    hertz = 700 * (10 ** (mel / 2595) - 1)
    left, peak, right = ((dft_length + 1) * hertz / sample_rate).floor().unfold(0, 3, 1).unbind(1)
    at = torch.arange(dft_length // 2 + 1, dtype=torch.float64, device=device).unsqueeze(1)
    # A side without width has no slope to compute; the peak is one whatever its sides.
    rising = torch.where((at >= left) & (at < peak), (at - left) / (peak - left), 0)
    falling = torch.where((at > peak) & (at < right), (right - at) / (right - peak), 0)
    return torch.where(at == peak, 1, rising + falling).to(torch_dtype(output_datatype))
