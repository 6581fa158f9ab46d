"""Operators of com.microsoft that move elements or compute with indices, against onnxruntime."""

import numpy as np
import pytest

rng = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a few roundings of float32


def test_older_forms_of_standard_operators_equal_onnxruntime(check) -> None:
    x = normal(3, 4, 5)
    check("SampleOp", [x])
    check("ExpandDims", [x, np.array(1, np.int32)])
    check("ExpandDims", [x, np.array(-1, np.int32)])
    check("GatherND", [x, np.array([[0, 1], [-1, 3]])])
    check("GatherND", [x, np.array([[[0, 1, 2]], [[2, 3, 4]]], np.int32)])
    check("Trilu", [x])
    check("Trilu", [x, np.array(-2)], {"upper": 0})
    check("Trilu", [x, np.array(1)], {"upper": 1}, constants=(1,))
    check("UnfoldTensor", [x], {"size": 2, "dim": 1, "step": 2})
    check("UnfoldTensor", [x], {"size": 3})
    u = rng.integers(-2, 3, 12).astype(np.float32)
    check("Unique", [u], outputs=(0, 1, 2))


def test_pad_equals_onnxruntime(check) -> None:
    x = normal(2, 3, 4)
    pads = np.array([0, 1, 2, 1, 0, -1])
    check("Pad", [x, pads])
    check("Pad", [x, pads, np.array([2.5], np.float32)], constants=(1,))
    check("Pad", [x, pads[None]], {"mode": "edge"})
    check("Pad", [x, np.array([0, 1, 2, 1, 0, 1])], {"mode": "reflect"})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32, np.int64])
def test_range_equals_onnxruntime(check, dtype) -> None:
    check("Range", [np.array(v, dtype) for v in (1, 12, 3)])
    check("Range", [np.array([v], dtype) for v in (9, -2, -3)])
    check("Range", [np.array(v, dtype) for v in (0, 5)])
    check("Range", [np.array(v, dtype) for v in (5, 0)])


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align_corners", [0, 1])
def test_grid_sample_equals_onnxruntime(check, mode, padding_mode, align_corners) -> None:
    grid = rng.uniform(-1.5, 1.5, (2, 3, 6, 2)).astype(np.float32)
    attributes = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    check("GridSample", [normal(2, 3, 5, 4), grid], attributes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(3, 4), (1, 1)])
def test_crop_and_resize_equals_onnxruntime(check, mode, size) -> None:
    boxes = rng.uniform(-0.2, 1.2, (4, 4)).astype(np.float32)
    boxes[0] = [0.0, 0.0, 1.0, 1.0]
    images = np.array([0, 1, 1, 0], np.int32)
    inputs = [normal(2, 3, 6, 5), boxes, images, np.array(size, np.int32)]
    check("CropAndResize", inputs, {"mode": mode, "extrapolation_value": 7.0}, **CLOSE)


def test_linear_algebra_equals_onnxruntime(check) -> None:
    check("Inverse", [normal(2, 4, 4) + 4 * np.eye(4, dtype=np.float32)], **CLOSE)
    check("CDist", [normal(3, 5), normal(4, 5)], **CLOSE)
    check("CDist", [normal(3, 5), normal(4, 5)], {"metric": "euclidean"}, **CLOSE)


def test_complex_numbers_and_spectra_equal_numpy(check) -> None:
    a, b = normal(3, 4, 2), normal(3, 4, 2)
    x, y = a[..., 0] + 1j * a[..., 1], b[..., 0] + 1j * b[..., 1]

    def pairs(z: np.ndarray) -> list[np.ndarray]:
        return [np.stack((z.real, z.imag), -1).astype(np.float32)]

    check("ComplexMul", [a, b], expected=pairs(x * y), **CLOSE)
    check("ComplexMulConj", [a, b], expected=pairs(x * y.conj()), **CLOSE)
    signal = normal(3, 4, 8)
    check("Rfft", [signal], expected=pairs(np.fft.rfft(signal)), **CLOSE)
    check("Rfft", [signal], {"signal_ndim": 2}, expected=pairs(np.fft.rfft2(signal)), **CLOSE)
    (spectrum,) = pairs(np.fft.rfft2(signal))
    check("Irfft", [spectrum], {"signal_ndim": 2, "onesided": 1}, expected=[signal], **CLOSE)


def test_finiteness_is_that_of_all_inputs(check) -> None:
    x, nan, inf = normal(3), np.array([np.nan], np.float32), np.array([np.inf], np.float32)
    for attributes, inputs, wanted in (
        ({}, [x, x], True),
        ({}, [x, nan], False),
        ({"isinf_only": 1}, [x, nan], True),
        ({"isinf_only": 1}, [x, inf], False),
        ({"isnan_only": 1}, [inf, x], True),
    ):
        check("IsAllFinite", inputs, attributes, expected=[np.array(wanted)])


def test_embedding_and_repeated_n_grams_equal_their_oracles(check) -> None:
    table, rows = normal(7, 3), rng.integers(0, 7, (2, 4))
    check("TorchEmbedding", [table, rows], expected=[table[rows]])
    check("TorchEmbedding", [table, rows, np.array(2)], expected=[table[rows]])
    ids = np.array([[1, 2, 3, 1, 2], [4, 4, 4, 4, 4]])
    for size in (1, 2, 3, 6):
        check("NGramRepeatBlock", [ids, normal(2, 6)], {"ngram_size": size})


@pytest.mark.parametrize("attributes", [{}, {"positive": 0, "seed": 42}])
def test_hashes_equal_onnxruntime(check, attributes) -> None:
    for dtype in (np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64):
        check("MurmurHash3", [rng.integers(0, 2**31, (2, 3)).astype(dtype)], attributes)
    texts = np.array(["", "a", "four", "longer than four"], object)
    check("MurmurHash3", [texts], attributes)
