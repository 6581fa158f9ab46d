"""What each form gives back of any table that it can hold."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwrap.config import QuantSpec
from qwrap.dtypes import FLOATS, INT8, INT32, INTEGERS, integer_type
from qwrap.quant.tables import FORMS, RangeTable, TensorRange

# A first { or [ makes a file of lines look like JSON, unless its form is said.
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0{["), min_size=1)
SCALES = st.floats(2.0**-90, 2.0**90, width=32)
CODES = (*INTEGERS, *map(integer_type, (3, 7, 12)))
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def plain_ranges(draw, shapes=((), (1,), (3,), (1, 2, 1)), dtypes=(np.float32, np.float16)):
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
    limit = 60000 if dtype == np.float16 else 2.0**100
    values = st.floats(-limit, limit, width=np.dtype(dtype).itemsize * 8)
    ends = draw(arrays(dtype, (2, *shape), elements=values))
    ends.sort(axis=0)
    return TensorRange(ends[0], ends[1])


def ends_of(scale, zero_point, dtype):
    """``(code - zero_point) * scale`` for the first and last code, rounded once to float32."""
    first, last = (np.asarray(q - zero_point.astype(np.int64)) for q in (dtype.qmin, dtype.qmax))
    if not dtype.is_integer:
        first, last = np.full(scale.shape, dtype.qmin), np.full(scale.shape, dtype.qmax)
    return [(end.astype(np.float32) * scale).astype(np.float32) for end in (first, last)]


@st.composite
def quantized_ranges(draw, dtypes=CODES, axis=True, blocks=0):
    """A range with a scale, whose ends are those of its codes; axis and blocks as asked for."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.sampled_from([(2, 3), (1, 1)] if blocks else [(), (3,), (2,)]))
    scale = draw(arrays(np.float32, shape, elements=SCALES))
    codes = st.integers(int(dtype.qmin), int(dtype.qmax)) if dtype.is_integer else st.just(0)
    zero_point = draw(arrays(np.int32, shape, elements=codes))
    if dtype == INT32:
        zero_point[...] = 0
    low, high = ends_of(scale, zero_point, dtype)
    told = {"axis": draw(st.integers(0, 1)) if blocks else 0} if axis and shape else {}
    told |= {"block_size": blocks} if blocks else {}
    stored = {"stored": draw(st.booleans())} if not axis else {}
    return TensorRange(low, high, scale=scale, zero_point=zero_point, dtype=dtype, **told, **stored)


def back(table: RangeTable, tmp_path, form: str) -> RangeTable:
    table.write(tmp_path / "t", form)
    read = RangeTable.read(tmp_path / "t", form)
    if len(table):
        assert read == RangeTable.read(tmp_path / "t"), "the form is not told by the contents"
    read.write(tmp_path / "again", form)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "t").read_bytes()
    return read


@quick
@given(
    ranges=st.dictionaries(NAMES, plain_ranges(), max_size=4),
    method=st.sampled_from(["MinMax", "Entropy", "Percentile", "Distribution"]),
    hist=arrays(np.int64, 5, elements=st.integers(0, 2**50)),
    smooth=st.booleans(),
)
def test_onnxruntimes_cache_gives_everything_back(tmp_path, ranges, method, hist, smooth) -> None:
    for entry in ranges.values():
        edges = np.linspace(-1, 1, 6, dtype=np.float32)
        entry.statistics = {"hist": hist, "hist_edges": edges, "bins": 5}
    table = RangeTable(ranges, method=method, smooth_quant=smooth)
    read = back(table, tmp_path, "onnxruntime")
    assert read == table
    assert (read.method, read.smooth_quant) == (method, smooth)


@quick
@given(ranges=st.dictionaries(NAMES, plain_ranges(shapes=((),)), max_size=4))
def test_tensorrts_json_gives_ranges_back(tmp_path, ranges) -> None:
    assert back(RangeTable(ranges), tmp_path, "tensorrt-json") == ranges


@quick
@given(ranges=st.dictionaries(NAMES, plain_ranges(shapes=((),)), max_size=4))
@pytest.mark.parametrize("form", ["tensorrt-text", "tensorrt-flatbuffers"])
def test_tensorrts_tables_give_the_absolute_maximum_back(tmp_path, form: str, ranges) -> None:
    read = back(RangeTable(ranges), tmp_path, form)
    assert read.keys() == ranges.keys()
    for name, entry in ranges.items():
        largest = np.float32(max(abs(entry.low), abs(entry.high)))
        assert read[name] == TensorRange(-largest, largest)


@quick
@given(scales=st.dictionaries(NAMES, st.floats(2.0**-60, 2.0**60, width=32), max_size=4))
def test_tensorrts_cache_gives_int8_scales_back(tmp_path, scales) -> None:
    ranges = {
        n: TensorRange(*(np.float32(q) * np.float32(s) for q in (-127, 127)), scale=s, dtype=INT8)
        for n, s in scales.items()
    }
    assert back(RangeTable(ranges), tmp_path, "tensorrt") == ranges


@quick
@given(
    ranges=st.dictionaries(
        NAMES,
        st.one_of(
            quantized_ranges((*CODES, INT32, *FLOATS)),
            quantized_ranges(blocks=32),
        ),
        max_size=4,
    )
)
def test_aimet_2_0_0_gives_everything_back(tmp_path, ranges) -> None:
    assert back(RangeTable(ranges), tmp_path, "aimet-2.0.0") == ranges


@quick
@given(ranges=st.dictionaries(NAMES, quantized_ranges(axis=False), max_size=4))
@pytest.mark.parametrize("form", ["aimet-0.6.1", "aimet-1.0.0", "qnn"])
def test_older_encodings_give_the_same_grid_back(tmp_path, form: str, ranges) -> None:
    """Signed codes whose zero is not 0 come back as the unsigned ones of the same values."""
    read = back(RangeTable(ranges), tmp_path, form)
    assert read.keys() == ranges.keys()
    for name, entry in ranges.items():
        same = read[name]
        np.testing.assert_array_equal(same.scale, entry.scale)
        assert same.stored == entry.stored
        np.testing.assert_array_equal(same.low, entry.low)
        np.testing.assert_array_equal(same.high, entry.high)
        shift = int(entry.dtype.qmin - same.dtype.qmin)
        np.testing.assert_array_equal(same.zero_point + shift, entry.zero_point)
        assert same.dtype == entry.dtype or not entry.symmetric


def test_every_form_is_here() -> None:
    assert set(FORMS) == {
        *("onnxruntime", "tensorrt", "tensorrt-flatbuffers", "tensorrt-json", "tensorrt-text"),
        *("aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qnn"),
    }


@quick
@given(entry=plain_ranges(shapes=((), (3,)), dtypes=(np.float32,)), symmetric=st.booleans())
@pytest.mark.parametrize("form", ["aimet-0.6.1", "aimet-1.0.0", "qnn"])
def test_ranges_of_other_tools_become_encodings(tmp_path, form: str, entry, symmetric) -> None:
    spec = QuantSpec(dtype="int8" if symmetric else "uint8", symmetric=symmetric)
    table = RangeTable({"x": entry}).with_scales(spec)
    read = back(table, tmp_path, form)["x"]
    np.testing.assert_array_equal(read.scale, table["x"].scale)
    np.testing.assert_array_equal(read.zero_point, table["x"].zero_point)
    if form != "aimet-1.0.0":  # within what the codes reach, but for rounding half a step
        assert (np.abs(read.low - entry.low) <= 0.51 * read.scale).all() or symmetric
