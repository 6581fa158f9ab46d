"""A tensor's range: what it refuses, and which scale a tensor of a given spec gets of it."""

import numpy as np
import pytest
import torch

from qwrap.config import QuantSpec
from qwrap.dtypes import FLOAT8E4M3FN, INT4, INT8, UINT8
from qwrap.errors import TableError
from qwrap.numerics import QParams, choose_qparams
from qwrap.quant.tables import TensorRange

ASYMMETRIC = QuantSpec(dtype=UINT8, symmetric=False)


def same(mine: QParams, scale, zero_point, spec: QuantSpec) -> None:
    np.testing.assert_array_equal(mine.scale, np.float32(scale))
    np.testing.assert_array_equal(mine.zero_point, zero_point)
    assert (mine.scale.dtype, mine.zero_point.dtype) == (torch.float32, torch.int32)
    assert (mine.axis, mine.block_size) == (spec.axis, spec.block_size)


def test_a_range_is_spread_over_the_codes() -> None:
    same(TensorRange(-1, 3).qparams(ASYMMETRIC), [4 / 255], [64], ASYMMETRIC)


def test_a_scale_of_the_same_type_is_taken_as_it_is() -> None:
    entry = TensorRange(-1, 3, scale=0.0123, zero_point=7, dtype=UINT8)
    same(entry.qparams(ASYMMETRIC), [0.0123], [7], ASYMMETRIC)


@pytest.mark.parametrize(("dtype", "zero_point"), [(UINT8, 133), (INT8, 5)])
def test_the_zero_point_moves_with_the_sign_of_the_codes(dtype, zero_point: int) -> None:
    entry = TensorRange(-1, 3, scale=0.5, zero_point=zero_point, dtype=dtype)
    for asked, expected in ((UINT8, 133), (INT8, 5)):
        spec = QuantSpec(dtype=asked, symmetric=False)
        same(entry.qparams(spec), [0.5], [expected], spec)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(dtype=INT8),
        QuantSpec(dtype=INT4, symmetric=False),
        QuantSpec(dtype=FLOAT8E4M3FN),
        QuantSpec(dtype=UINT8, symmetric=False, power_of_two=True),
        QuantSpec(dtype=UINT8, symmetric=False, restricted=True),
        QuantSpec(dtype=UINT8, symmetric=False, scale_type="float16"),
    ],
    ids=["symmetric", "bits", "float", "power", "restricted", "float16"],
)
def test_a_scale_that_the_spec_cannot_have_is_chosen_anew(spec: QuantSpec) -> None:
    entry = TensorRange(-1, 3, scale=0.0123, zero_point=7, dtype=UINT8)
    expected = choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), spec)
    same(entry.qparams(spec), expected.scale, expected.zero_point, spec)


def test_one_range_serves_all_channels() -> None:
    spec = QuantSpec(dtype=INT8, axis=1)
    same(TensorRange(-2, 1, scale=0.5, dtype=INT8).qparams(spec, (3,)), [0.5] * 3, [0] * 3, spec)


def test_the_ranges_of_channels_are_joined_for_one_scale() -> None:
    entry = TensorRange([-1, 0], [1, 3], scale=[1, 2], dtype=UINT8, axis=0)
    same(entry.qparams(ASYMMETRIC), [4 / 255], [64], ASYMMETRIC)


def test_onnxruntimes_arrays_of_channels_are_laid_along_the_axis() -> None:
    ends = np.float32([1, 2, 3]).reshape(1, 3, 1, 1)
    spec = QuantSpec(dtype=INT8, axis=1, narrow_range=True)
    same(TensorRange(-ends, ends).qparams(spec, (3,)), np.float32([1, 2, 3]) / 127, [0] * 3, spec)


def test_blocks_of_an_aimet_1_0_0_file_are_laid_out_by_the_axis() -> None:
    scale = np.float32([1, 2, 3, 4, 5, 6])
    entry = TensorRange(-8 * scale, 7 * scale, scale=scale, dtype=INT4, block_size=16)
    spec = QuantSpec(dtype=INT4, axis=0, block_size=16)  # [K, N]: two blocks, three outputs
    same(entry.qparams(spec, (2, 3)), [[1, 3, 5], [2, 4, 6]], np.zeros((2, 3)), spec)
    spec = QuantSpec(dtype=INT4, axis=1, block_size=16)  # [M, C, ...] of a convolution
    same(entry.qparams(spec, (3, 2)), [[1, 2], [3, 4], [5, 6]], np.zeros((3, 2)), spec)


def test_another_number_of_ranges_is_refused() -> None:
    with pytest.raises(TableError, match="holds 2 ranges; the tensor has 3 scales"):
        TensorRange([0, 0], [1, 2]).qparams(QuantSpec(axis=0), (3,))


@pytest.mark.parametrize(
    ("told", "spec", "message"),
    [
        ({"axis": 1}, QuantSpec(axis=0), "along axis 1; the tensor's is 0"),
        ({"axis": 0, "block_size": 2}, QuantSpec(axis=0), "blocks of 2 values; .* blocks of all"),
        (
            {"axis": 0, "block_size": 2},
            QuantSpec(axis=0, block_size=4),
            "blocks of 2 values; .* of 4",
        ),
    ],
)
def test_ranges_laid_out_otherwise_are_refused(told: dict, spec: QuantSpec, message: str) -> None:
    entry = TensorRange([0, 0], [1, 2], scale=[1, 2], dtype=UINT8, **told)
    with pytest.raises(TableError, match=message):
        entry.qparams(spec, (2,))


def test_blocks_of_another_shape_are_refused() -> None:
    ends = np.ones((2, 3), np.float32)
    entry = TensorRange(-ends, ends, scale=ends, dtype=INT8, axis=0, block_size=2)
    with pytest.raises(TableError, match=r"shape \[2, 3\]; the tensor's scale has \[3, 2\]"):
        entry.qparams(QuantSpec(axis=0, block_size=2), (3, 2))


def test_a_scale_can_be_given_to_a_range() -> None:
    entry = TensorRange([-1, 0], [3, 1], axis=1).with_scale(ASYMMETRIC)
    np.testing.assert_array_equal(entry.scale, np.float32([4 / 255, 1 / 255]))
    np.testing.assert_array_equal(entry.zero_point, [64, 0])
    assert (entry.low.tolist(), entry.axis, entry.dtype) == ([-1, 0], 1, UINT8)


def test_symmetric_is_told_by_the_zero_point() -> None:
    told = {
        (dtype, z): TensorRange(0, 1, scale=1, zero_point=z, dtype=dtype).symmetric
        for dtype in (UINT8, INT8)
        for z in (0, 127)
    }
    assert told == {(UINT8, 0): False, (UINT8, 127): False, (INT8, 0): True, (INT8, 127): False}
    assert TensorRange(0, 1, scale=1, zero_point=128, dtype=UINT8).symmetric
    assert TensorRange(0, 1).symmetric is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1, "high": 0}, "low 1 is above high 0"),
        ({"low": [0, 2], "high": [1, 1]}, r"low 2 is above high 1 \(index 1\)"),
        ({"low": [0], "high": 1}, r"shapes \[1\] and \[\]"),
        ({"low": [], "high": []}, "the range is empty"),
        ({"low": float("nan"), "high": 1}, "low is not finite"),
        ({"low": 0, "high": 1e39}, "high is not finite"),
        ({"low": "a", "high": 1}, "low holds .*; expected numbers"),
        ({"low": 0, "high": 1, "zero_point": 1}, "a zero point needs a scale"),
        ({"low": 0, "high": 1, "scale": 1}, "a scale needs the type of the codes"),
        ({"low": 0, "high": 1, "scale": 0, "dtype": UINT8}, "scale 0: expected more than 0"),
        ({"low": 0, "high": 1, "scale": [1], "dtype": UINT8}, "expected the same shape"),
        ({"low": 0, "high": 1, "scale": 1, "zero_point": 256, "dtype": UINT8}, "uint8 has 0 … 255"),
        ({"low": 0, "high": 1, "scale": 1, "zero_point": 0.5, "dtype": UINT8}, "a whole number"),
        (
            {"low": 0, "high": 1, "scale": 1, "zero_point": 1, "dtype": FLOAT8E4M3FN},
            "float8e4m3fn has 0 … 0",
        ),
        ({"low": 0, "high": 1, "block_size": 0}, "block size 0: expected 1 or more"),
    ],
)
def test_nonsense_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(TableError, match=message):
        TensorRange(**arguments)


def test_equal_ranges_are_equal_and_others_are_not() -> None:
    entry = TensorRange(0, 1, scale=1, dtype=UINT8, statistics={"hist": np.arange(3)})
    assert entry == TensorRange(0, 1, scale=1, dtype=UINT8, statistics={"hist": np.arange(3)})
    assert entry != TensorRange(0, 1, scale=1, dtype=UINT8, statistics={"hist": np.arange(4)})
    assert entry != TensorRange(0, 1, scale=1, dtype=UINT8)
    assert TensorRange(np.float16(0), np.float16(1)) != TensorRange(0, 1)
    assert repr(TensorRange(0, 1.5)) == "TensorRange(low=0, high=1.5)"
