"""Types: odd integers and code books."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from qwrap.config import QuantSpec
from qwrap.dtypes import INT4, UINT4, UINT8, codebook_type, integer_type, quant_type
from qwrap.errors import ConfigError
from qwrap.numerics import choose_qparams, fake_quantize


@given(bits=st.integers(2, 16), signed=st.booleans())
def test_an_integer_has_two_to_its_bits_codes_and_a_carrier_that_holds_them(
    bits: int, signed: bool
) -> None:
    made = integer_type(bits, signed=signed)
    assert made.qmax - made.qmin == 2**bits - 1
    assert made.signed == signed
    info = torch.iinfo(made.torch_dtype)
    assert info.min <= made.qmin <= made.qmax <= info.max
    assert made.is_standard == (bits in (2, 4, 8, 16))
    assert quant_type(made.name) == made


@pytest.mark.parametrize("bits", [1, 17])
def test_an_integer_of_other_widths_is_refused(bits: int) -> None:
    with pytest.raises(ConfigError, match="choose from 2 to 16"):
        integer_type(bits)
    with pytest.raises(ConfigError, match="no quantized type"):
        quant_type(f"int{bits}")


def test_odd_integers_are_carried_by_the_next_wider_type_of_onnx() -> None:
    assert quant_type("int3").onnx_type == INT4.onnx_type
    assert quant_type("uint3").onnx_type == UINT4.onnx_type
    assert quant_type("int5").onnx_type == TensorProto.INT8
    assert quant_type("uint12").onnx_type == TensorProto.UINT16


def test_a_code_book_has_its_levels_in_float32_in_order() -> None:
    made = codebook_type("thirds", [1 / 3, 0, -1 / 3])
    third = float(np.float32(1 / 3))
    assert made.levels == (-third, 0.0, third)
    assert (made.qmin, made.qmax, made.bits) == (-third, third, 2)
    assert made.onnx_type == UINT4.onnx_type
    assert codebook_type("many", range(17)).onnx_type == UINT8.onnx_type


@pytest.mark.parametrize(
    ("name", "levels", "match"),
    [
        ("int3", [0, 1], "cannot be called"),
        ("uint8", [0, 1], "cannot be called"),
        ("float8e5m2", [0, 1], "cannot be called"),
        ("a b", [0, 1], "cannot be called"),
        ("é", [0, 1], "cannot be called"),
        ("few", [0], "2 to 256 levels"),
        ("many", range(257), "2 to 256 levels"),
        ("twice", [0, 1, 1 + 1e-12], "differ in float32; got 3, 2 of them"),
        ("two_zeros", [0.0, -0.0, 1], "differ in float32"),
        ("no_zero", [1, 2], "hold 0"),
        ("infinite", [0, 1e39], "must be finite"),
        ("nan", [0, float("nan")], "must be finite"),
    ],
)
def test_a_code_book_that_cannot_be_is_refused(name: str, levels: list[float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        codebook_type(name, levels)


@given(
    low=st.floats(-1e3, 0, width=32),
    high=st.floats(0, 1e3, width=32),
    levels=st.sampled_from([(0, 1), (-1, 0, 3), (-8, 0), (-1, -0.5, 0, 0.5, 1), (0, 2, 5)]),
)
def test_the_scale_of_a_code_book_takes_an_end_of_the_range_to_its_level(
    low: float, high: float, levels: tuple[float, ...]
) -> None:
    spec = QuantSpec(dtype=codebook_type("table", levels))
    qparams = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    wanted = [e / q for e, q in ((low, min(levels)), (high, max(levels))) if q and e]
    scale = np.float32(max(2.0**-62, *wanted)) if wanted else 1.0
    assert qparams.scale.item() == scale
    assert qparams.zero_point.item() == 0
    ends = torch.tensor([low, high])
    reached = fake_quantize(ends, qparams.scale, qparams.zero_point, spec)
    represented = ends.clamp(float(scale * min(levels)), float(scale * max(levels)))
    gap = float(scale) * max(np.diff(levels)) / 2
    assert (reached - represented).abs().max() <= gap * (1 + 1e-6)  # float32 products
