"""Ranges from mean and deviation against published constants and onnxruntime's float8 rule."""

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp_float8

from qwrap.config import QuantSpec
from qwrap.dtypes import codebook_type
from qwrap.numerics import choose_qparams
from qwrap.quant.observe.observers import HistogramObserver
from qwrap.quant.ranges import choose_ranges
from qwrap.quant.ranges.distribution import deviation_of, moments, normal_clip
from qwrap.quant.ranges.rows import HistogramRows


def observed(x: np.ndarray) -> HistogramObserver:
    observer = HistogramObserver("x")
    observer.observe(torch.from_numpy(x.astype(np.float32)))  # 1-D: seen whole
    return observer


def chosen(x: np.ndarray, spec: QuantSpec) -> tuple[float, float]:
    ((low, high),) = choose_ranges([observed(x)], [spec], ["distribution"], [100])
    return low.item(), high.item()


# J. Max, "Quantizing for minimum distortion", 1960, table II: equal steps for a normal variable.
@pytest.mark.parametrize(
    ("codes", "step"), [(2, 1.596), (4, 0.9957), (8, 0.5860), (16, 0.3352), (32, 0.1881)]
)
def test_the_reach_of_integers_is_that_of_maxs_table(codes: int, step: float) -> None:
    assert normal_clip(codes) / (codes - 1) * 2 == pytest.approx(step, abs=3e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 16])
def test_no_other_reach_has_less_error_for_normal_values(bits: int) -> None:
    end = normal_clip(2**bits)
    t = np.linspace(0, 9, 400_001)
    density = np.exp(-(t**2) / 2)

    def error(end: float) -> float:
        step = 2 * end / (2**bits - 1)
        code = np.clip(np.floor(t / step), 0, 2 ** (bits - 1) - 1) + 0.5
        return float(((t - code * step) ** 2 * density).sum())

    assert error(end) < min(error(end * 0.97), error(end * 1.03))


def test_integers_reach_from_the_mean_but_not_beyond_what_was_seen() -> None:
    x = np.random.default_rng(0).normal(0.5, 1, 200_000)
    spec = QuantSpec(dtype="uint4", symmetric=False)
    reach = normal_clip(16)
    assert chosen(x, spec) == pytest.approx((0.5 - reach, 0.5 + reach), abs=0.02)
    assert chosen(x.clip(0, 2), spec) == (0, 2)


@pytest.mark.parametrize("dtype", ["float8e4m3fn", "float8e5m2", "float8e4m3fnuz", "float4e2m1"])
def test_floats_have_the_scale_that_equals_deviations(dtype: str) -> None:
    x = np.random.default_rng(1).normal(0.3, 2, 100_000)
    spec = QuantSpec(dtype=dtype)
    low, high = chosen(x, spec)
    scale = choose_qparams(torch.tensor(low), torch.tensor(high), spec).scale.item()
    assert scale * deviation_of(spec.dtype) == pytest.approx(x.std(), rel=1e-4)  # bins of 1 / 256


def test_float8_has_the_scale_of_onnxruntime() -> None:
    x = np.random.default_rng(2).standard_t(5, 100_000)
    _, theirs = compute_scale_zp_float8(TensorProto.FLOAT8E4M3FN, np.float32(x.std()))
    spec = QuantSpec(dtype="float8e4m3fn")
    low, high = chosen(x, spec)
    scale = choose_qparams(torch.tensor(low), torch.tensor(high), spec).scale.item()
    assert scale == pytest.approx(float(theirs), rel=1e-3)  # a bin is an eighth of a percent wide


def test_code_books_have_the_scale_that_equals_deviations() -> None:
    x = np.random.default_rng(3).normal(0, 2, 100_000)
    spec = QuantSpec(dtype=codebook_type("uneven", [-0.5, 0, 0.25, 1]))
    low, high = chosen(x, spec)
    scale = choose_qparams(torch.tensor(low), torch.tensor(high), spec).scale.item()
    assert scale * np.std([-0.5, 0, 0.25, 1]) == pytest.approx(x.std(), rel=1e-4)


def test_mean_and_deviation_are_those_of_evenly_filled_bins_and_zeros() -> None:
    counts = torch.zeros(1, 17, dtype=torch.int64)
    counts[0, 8], counts[0, 12], counts[0, -1] = 30, 10, 30  # 30 zeros, 10 from 4 to 4.5
    ends = torch.tensor([0.0]), torch.tensor([4.5])
    rows = HistogramRows.of(counts, torch.tensor([3], dtype=torch.int32), *ends)
    mean, deviation = moments(rows)
    assert mean.item() == 4.25 * 10 / 40
    second = 10 / 40 * (4.25**2 + 0.5**2 / 12)
    assert deviation.item() == pytest.approx(math.sqrt(second - (4.25 / 4) ** 2))
