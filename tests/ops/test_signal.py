"""Fourier transforms, windows and mel filters: onnxruntime, numpy, finite differences."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(9)
REAL = rng.normal(size=(2, 5, 6, 1)).astype(np.float32)
COMPLEX = rng.normal(size=(2, 5, 6, 2)).astype(np.float32)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a dozen roundings of sums of at most 20 terms


def int64(value: int) -> np.ndarray:
    return np.array(value, np.int64)


@pytest.mark.parametrize("length", [None, 4, 5, 9])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("x", [REAL, COMPLEX], ids=["real", "complex"])
def test_dft_equals_numpy(x, axis, length) -> None:
    operator = ops.find("", "DFT", 20)
    assert operator is not None
    signal = x[..., 0] + (1j * x[..., 1] if x.shape[-1] == 2 else 0)
    for inverse, onesided in ((0, 0), (1, 0), (0, 1), (1, 1)):
        got = operator.function(
            torch.from_numpy(x), length, axis - 4, inverse=inverse, onesided=onesided
        )
        if inverse and onesided:
            wanted = np.fft.irfft(signal, length, axis)[..., None]
        else:
            wanted = (np.fft.ifft if inverse else np.fft.fft)(signal, length, axis)
            wanted = np.stack((wanted.real, wanted.imag), -1)
        if onesided and not inverse:
            wanted = wanted.take(range((length or x.shape[axis]) // 2 + 1), axis)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got, wanted, **CLOSE)


def test_dft_equals_onnxruntime(check) -> None:
    for opset, extra in ((17, {"axis": 2}), (19, {"axis": -3}), (17, {})):
        for attributes in ({}, {"onesided": 1}):
            check("DFT", opset, [REAL], {**extra, **attributes}, **CLOSE)
        for attributes in ({}, {"inverse": 1}):
            check("DFT", opset, [COMPLEX, int64(7)], {**extra, **attributes}, **CLOSE)
    check("DFT", 20, [COMPLEX, int64(4), int64(1)], {"inverse": 1}, **CLOSE)
    check("DFT", 20, [REAL, None, int64(-2)], {"onesided": 1}, **CLOSE)
    check("DFT", 20, [REAL.astype(np.float64)], {}, **CLOSE)


def test_dft_of_half_precision_is_that_of_float32() -> None:
    operator = ops.find("", "DFT", 20)
    assert operator is not None
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(COMPLEX).to(dtype)
        assert torch.equal(operator.function(x), operator.function(x.float()).to(dtype))


WAVE = rng.normal(size=(2, 40, 1)).astype(np.float32)
WINDOW = np.hanning(16).astype(np.float32)


def test_stft_equals_onnxruntime(check) -> None:
    step, size = int64(7), int64(16)
    for onesided in (0, 1):
        check("STFT", 17, [WAVE, step, WINDOW, size], {"onesided": onesided}, **CLOSE)
        check("STFT", 17, [WAVE, step, WINDOW], {"onesided": onesided}, **CLOSE)
        check("STFT", 17, [WAVE, step, None, size], {"onesided": onesided}, **CLOSE)
    pairs = rng.normal(size=(2, 40, 2)).astype(np.float32)
    check("STFT", 17, [pairs, step, WINDOW], {"onesided": 0}, **CLOSE)


@pytest.mark.parametrize(
    ("op_type", "opset", "x", "constants", "attributes"),
    [
        ("DFT", 20, REAL[0], [7, 0], {"onesided": 1}),
        ("DFT", 20, COMPLEX[0], [8, 1], {"inverse": 1, "onesided": 1}),
        ("DFT", 17, COMPLEX[0], [], {"inverse": 1}),
        ("STFT", 17, WAVE[:, :20], [5, torch.from_numpy(WINDOW).double()], {}),
    ],
)
def test_gradients(check_gradients, op_type, opset, x, constants, attributes) -> None:
    check_gradients(op_type, opset, [torch.from_numpy(x)], constants, **attributes)


@pytest.mark.parametrize("periodic", [0, 1])
@pytest.mark.parametrize("op_type", ["HannWindow", "HammingWindow", "BlackmanWindow"])
def test_windows_equal_onnxruntime(check, op_type: str, periodic: int) -> None:
    for size in (2, 9, 10):
        check(op_type, 17, [int64(size)], {"periodic": periodic}, atol=1e-6)  # cosines in float32
        check(op_type, 17, [int64(size)], {"periodic": periodic, "output_datatype": 11}, atol=1e-6)


MEL = [
    (8, 16, 8192, 0.0, 4096.0),
    (40, 512, 16000, 20.0, 7600.0),
    (80, 400, 16000, 0.0, 8000.0),
    (20, 64, 8000, 300.0, 3999.0),
]


@pytest.mark.parametrize("setting", MEL)
@pytest.mark.parametrize("to", [1, 11])
def test_mel_filters_equal_onnxruntime(check, setting, to: int) -> None:
    inputs = [int64(n) for n in setting[:3]] + [np.array(f, np.float32) for f in setting[3:]]
    check("MelWeightMatrix", 17, inputs, {"output_datatype": to}, rtol=1e-6)
