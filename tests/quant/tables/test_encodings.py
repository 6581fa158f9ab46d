"""AIMET's and QNN's encodings, by value: a code u on the grid 0 … 2^b - 1 is (u + offset) * scale.

The files are built here from the formulas of AIMET's encoding specification; the ranges expected of
them follow from the same formulas by hand.
"""

import json

import numpy as np
import pytest

from qwrap.dtypes import FLOAT8E4M3FN, INT4, INT8, INT16, INT32, UINT8, UINT16
from qwrap.errors import TableError
from qwrap.quant.tables import RangeTable, TensorRange


def file(tmp_path, content: object):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    return path


def v0(tmp_path, *channels: dict, section: str = "activation_encodings", **top: str) -> TensorRange:
    encodings = [{"bitwidth": 8, "dtype": "int", "is_symmetric": "False", **c} for c in channels]
    return RangeTable.read(file(tmp_path, {**top, section: {"x": encodings}}))["x"]


def v1(tmp_path, section: str = "param_encodings", **encoding: object) -> TensorRange:
    said = {"name": "x", "dtype": "INT", "bw": 8, "is_sym": False, **encoding}
    return RangeTable.read(file(tmp_path, {"version": "1.0.0", section: [said]}))["x"]


def v2(tmp_path, **encoding: object) -> TensorRange:
    said = {"name": "x", **encoding}
    return RangeTable.read(file(tmp_path, {"version": "2.0.0", "encodings": [said]}))["x"]


def written(tmp_path, form: str, **entries: TensorRange):
    RangeTable(entries).write(tmp_path / "out.json", form)
    return json.loads((tmp_path / "out.json").read_text())


def channels(entry: TensorRange) -> list[tuple[float, int]]:
    return list(
        zip(entry.scale.reshape(-1).tolist(), entry.zero_point.reshape(-1).tolist(), strict=True)
    )


# --- up to 0.6.1, and QNN


@pytest.mark.ort(359)
def test_the_example_of_aimets_specification(tmp_path) -> None:
    entry = v0(
        tmp_path,
        {
            "max": 2.6086959838867188,
            "min": -2.109158515930176,
            "offset": -114.0,
            "scale": 0.018501389771699905,
        },
        version="0.4.0",
    )
    assert (entry.dtype, int(entry.zero_point)) == (UINT8, 114)
    assert entry.low == np.float32(-2.109158515930176)
    assert not entry.stored


def test_an_offset_is_minus_the_zero_point(tmp_path) -> None:
    entry = v0(tmp_path, {"min": -2.5, "max": 125.0, "scale": 0.5, "offset": -5})
    assert (entry.dtype, channels(entry)) == (UINT8, [(0.5, 5)])
    assert (entry.low, entry.high) == (-2.5, 125.0)


def test_without_ends_they_follow_from_the_codes(tmp_path) -> None:
    entry = v0(tmp_path, {"scale": 0.5, "offset": -5})
    assert (entry.low, entry.high) == (-5 * 0.5, (255 - 5) * 0.5)


@pytest.mark.parametrize("offset", [-128, -127, 0], ids=["full", "strict", "left out"])
def test_symmetric_codes_are_signed_with_zero_at_0(tmp_path, offset: int) -> None:
    entry = v0(tmp_path, {"is_symmetric": "True", "scale": 0.25, "offset": offset})
    assert (entry.dtype, channels(entry)) == (INT8, [(0.25, 0)])
    assert entry.low == (-127 if offset == -127 else -128) * 0.25
    assert entry.high == 127 * 0.25


def test_a_symmetric_range_from_0_on_is_unsigned_in_all_but_name(tmp_path) -> None:
    entry = v0(
        tmp_path, {"is_symmetric": "True", "min": 0, "max": 255.0, "scale": 1.0, "offset": 0}
    )
    assert (entry.dtype, channels(entry)) == (INT8, [(1.0, -128)])
    assert (entry.low, entry.high) == (0, 255)


def test_a_symmetric_range_from_0_on_that_signed_codes_reach_is_signed(tmp_path) -> None:
    said = {"is_symmetric": "True", "min": 0, "max": 127.0, "scale": 1.0, "offset": 0}
    entry = v0(tmp_path, said)
    assert (channels(entry), entry.low, entry.high) == ([(1.0, 0)], 0, 127)


def test_ends_may_lie_within_those_of_the_codes_and_are_cut_to_them(tmp_path) -> None:
    scale = {"scale": np.float32(0.5), "zero_point": 5, "dtype": UINT8}
    for ends, expected in (((-1, 100), (-1, 100)), ((-99, 999), (-2.5, 125.0))):
        RangeTable({"x": TensorRange(*ends, **scale)}).write(tmp_path / "t", "aimet-0.6.1")
        assert RangeTable.read(tmp_path / "t")["x"] == TensorRange(*expected, **scale)


def test_old_files_write_offsets_without_their_sign(tmp_path) -> None:
    assert channels(v0(tmp_path, {"scale": 0.5, "offset": 11})) == [(0.5, 11)]


def test_a_list_of_encodings_is_one_for_each_channel(tmp_path) -> None:
    entry = v0(
        tmp_path,
        {"is_symmetric": "True", "scale": 0.5, "offset": -128},
        {"is_symmetric": "True", "scale": 0.25, "offset": -128},
        section="param_encodings",
    )
    assert entry.stored
    assert entry.axis is None  # the file does not tell
    assert channels(entry) == [(0.5, 0), (0.25, 0)]


def test_qnn_may_know_the_ends_alone(tmp_path) -> None:
    entry = v0(tmp_path, {"min": -1.0, "max": 3.0, "bitwidth": 16})
    assert (entry.dtype, entry.scale) == (UINT16, None)
    assert written(tmp_path, "qnn", x=entry)["activation_encodings"]["x"] == [
        {"bitwidth": 16, "dtype": "int", "is_symmetric": "False", "min": -1.0, "max": 3.0}
    ]
    with pytest.raises(TableError, match="tensor 'x': has a range but no scale"):
        written(tmp_path, "aimet-0.6.1", x=entry)


WEIGHT = TensorRange([-63.5, -127], [63.5, 127], scale=[0.5, 1], dtype=INT8, axis=0, stored=True)
INPUT = TensorRange(-2.5, 125.0, scale=0.5, zero_point=5, dtype=UINT8)


@pytest.mark.parametrize("form", ["aimet-0.6.1", "qnn"])
def test_what_is_written_follows_the_formulas(tmp_path, form: str) -> None:
    content = written(tmp_path, form, w=WEIGHT, x=INPUT)
    assert content.get("version") == (None if form == "qnn" else "0.6.1")
    kind = {"bitwidth": 8, "dtype": "int"}
    assert content["activation_encodings"] == {
        "x": [
            {**kind, "is_symmetric": "False", "min": -2.5, "max": 125, "scale": 0.5, "offset": -5}
        ]
    }
    symmetric = {**kind, "is_symmetric": "True", "offset": -128}
    assert content["param_encodings"] == {
        "w": [
            {**symmetric, "min": -63.5, "max": 63.5, "scale": 0.5},
            {**symmetric, "min": -127, "max": 127, "scale": 1},
        ]
    }


# --- 1.0.0


def test_1_0_0_of_one_scale(tmp_path) -> None:
    entry = v1(tmp_path, enc_type="PER_TENSOR", scale=[0.5], offset=[-5])
    assert (entry.dtype, channels(entry)) == (UINT8, [(0.5, 5)])
    assert (entry.low, entry.high, entry.low.ndim) == (-2.5, 125.0, 0)


def test_1_0_0_symmetric_channels(tmp_path) -> None:
    scale = [0.5, 0.25, 1.0]
    entry = v1(tmp_path, enc_type="PER_CHANNEL", bw=4, is_sym=True, scale=scale, offset=[-8] * 3)
    assert (entry.dtype, entry.stored) == (INT4, True)
    assert channels(entry) == [(s, 0) for s in scale]
    np.testing.assert_array_equal(entry.low, np.float32(scale) * -8)


def test_1_0_0_symmetric_from_0_on_is_aimets_unsigned_symmetric(tmp_path) -> None:
    entry = v1(tmp_path, enc_type="PER_TENSOR", is_sym=True, scale=[1.0], offset=[0])
    assert (entry.low, entry.high) == (0, 255)


def test_1_0_0_bias(tmp_path) -> None:
    entry = v1(tmp_path, enc_type="PER_TENSOR", bw=32, is_sym=True, scale=[1e-6], offset=[-(2**31)])
    assert (entry.dtype, int(entry.zero_point)) == (INT32, 0)


def test_low_power_blocks_are_multiples_of_the_channels_scale(tmp_path) -> None:
    said = {
        "enc_type": "LPBQ",
        "is_sym": True,
        "bw": 8,
        "compressed_bw": 4,
        "block_size": 64,
        "scale": [0.5, 0.001],
        "offset": [-128, -128],
        "per_block_int_scale": [1, 2, 16, 3, 5, 7],
    }
    entry = v1(tmp_path, **said)
    assert (entry.dtype, entry.block_size) == (INT4, 64)
    expected = np.outer([0.5, 0.001], [1, 1, 1]) * [[1, 2, 16], [3, 5, 7]]
    np.testing.assert_array_equal(entry.scale, expected.astype(np.float32).reshape(-1))
    (again,) = written(tmp_path, "aimet-1.0.0", x=entry)["param_encodings"]
    assert again == {"name": "x", "dtype": "INT", **said, "scale": [0.5, float(np.float32(0.001))]}


def test_blocks_are_written_output_channel_by_output_channel(tmp_path) -> None:
    """A MatMul's weight [K, N] with blocks along K: AIMET 1.0.0 wants [N, K / block]."""
    scale = np.arange(1, 7, dtype=np.float32).reshape(2, 3)  # two blocks, three output channels
    entry = TensorRange(
        -8 * scale, 7 * scale, scale=scale, dtype=INT4, axis=0, block_size=16, stored=True
    )
    (said,) = written(tmp_path, "aimet-1.0.0", w=entry)["param_encodings"]
    assert (said["enc_type"], said["block_size"]) == ("PER_BLOCK", 16)
    assert said["scale"] == [1, 4, 2, 5, 3, 6]
    assert said["offset"] == [-8] * 6


def test_floating_point_tensors_are_carried_along(tmp_path) -> None:
    content = {
        "version": "1.0.0",
        "activation_encodings": [
            {"name": "x", "dtype": "FLOAT", "bw": 16, "enc_type": "PER_TENSOR"}
        ],
        "param_encodings": [],
    }
    table = RangeTable.read(file(tmp_path, content))
    assert (len(table), table.floating) == (0, {"x": 16})
    for form in ("aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qnn"):
        table.write(tmp_path / form, form)
        assert RangeTable.read(tmp_path / form).floating == {"x": 16}, form
    table.write(tmp_path / "again.json", "aimet-1.0.0")
    assert json.loads((tmp_path / "again.json").read_text()) == content
    with pytest.raises(TableError, match=r"cannot say that \['x'\] stay in floating point"):
        table.write(tmp_path / "t", "onnxruntime")


# --- 2.0.0


def test_2_0_0_is_quantize_linear(tmp_path) -> None:
    entry = v2(tmp_path, output_dtype="uint8", y_scale=0.5, y_zero_point=5)
    assert (entry.dtype, channels(entry), entry.axis) == (UINT8, [(0.5, 5)], None)
    entry = v2(tmp_path, output_dtype="int16", y_scale=[0.5, 1.0], axis=1)
    assert (entry.dtype, channels(entry), entry.axis) == (INT16, [(0.5, 0), (1.0, 0)], 1)


def test_2_0_0_blocks_have_the_shape_of_the_tensor(tmp_path) -> None:
    scale = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    zero_point = [[1, 2, 3], [4, 5, 6]]
    said = {"output_dtype": "uint4", "y_scale": scale, "y_zero_point": zero_point}
    said |= {"axis": 0, "block_size": 32}
    entry = v2(tmp_path, **said)
    np.testing.assert_array_equal(entry.high, (15 - np.array(zero_point)) * np.array(scale))
    assert written(tmp_path, "aimet-2.0.0", x=entry)["encodings"] == [{"name": "x", **said}]


@pytest.mark.parametrize("channel", [[[0.5, 0.25]], [0.5, 0.25]])
def test_2_0_0_low_power_blocks(tmp_path, channel) -> None:
    said = {
        "output_dtype": "int4",
        "per_block_int_scale": [[1, 2], [3, 4], [5, 6]],
        "per_channel_float_scale": channel,
        "axis": 0,
        "block_size": 32,
    }
    entry = v2(tmp_path, **said)
    np.testing.assert_array_equal(entry.scale, [[0.5, 0.5], [1.5, 1], [2.5, 1.5]])
    (again,) = written(tmp_path, "aimet-2.0.0", x=entry)["encodings"]
    assert again == {"name": "x", **said, "per_channel_float_scale": [[0.5, 0.25]]}
    entry.stored = True
    (older,) = written(tmp_path, "aimet-1.0.0", x=entry)["param_encodings"]
    assert (older["bw"], older["compressed_bw"], older["scale"]) == (8, 4, [0.5, 0.25])
    assert older["per_block_int_scale"] == [1, 3, 5, 2, 4, 6]  # output channels first


def test_2_0_0_float_codes(tmp_path) -> None:
    entry = v2(tmp_path, output_dtype="float8e4m3fn", y_scale=0.5)
    assert (entry.dtype, entry.low, entry.high) == (FLOAT8E4M3FN, -224, 224)
    assert written(tmp_path, "aimet-2.0.0", x=entry)["encodings"] == [
        {"name": "x", "output_dtype": "float8e4m3fn", "y_scale": 0.5}
    ]
    with pytest.raises(TableError, match="cannot hold codes of type float8e4m3fn"):
        written(tmp_path, "aimet-1.0.0", x=entry)


def test_2_0_0_needs_the_axis_that_older_files_do_not_tell(tmp_path) -> None:
    entry = v1(tmp_path, enc_type="PER_CHANNEL", scale=[1, 2], offset=[0, 0])
    with pytest.raises(TableError, match="tensor 'x': has 2 scales and does not tell along which"):
        written(tmp_path, "aimet-2.0.0", x=entry)


# --- what is wrong with a file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0}, "scale 0: expected more than 0"),
        ({"scale": -1}, "scale -1: expected more than 0"),
        ({"scale": 1e-60}, "scale 0: expected more than 0, as a float32"),
        ({"scale": float("nan")}, "scale is not finite"),
        ({"scale": float("inf")}, "scale is not finite"),
        ({"scale": "1"}, "'scale': expected numbers; got '1'"),
        ({"scale": True}, "'scale': expected numbers; got True"),
        ({"scale": [1.0]}, "scale or offset is a list; expected one number"),
        ({"scale": 10**400}, "'scale': expected numbers; got"),
        ({"offset": -256}, r"zero point 256 … 256: uint8 has 0 … 255"),
        ({"offset": -1.5}, "zero point 1.5: expected a whole number"),
        ({"offset": None}, "'offset': expected numbers; got None"),
        ({"bitwidth": 64}, "64 bits, asymmetric: expected 2 to 16"),
        ({"bitwidth": 10**30}, "'bitwidth' is 1000.*; expected a number of bits"),
        ({"bitwidth": 1e300}, "'bitwidth' is 1000.*; expected a number of bits"),
        ({"bitwidth": "8"}, "'bitwidth' is '8'; expected a whole number"),
        ({"is_symmetric": "maybe"}, "'is_symmetric' is 'maybe'; expected true or false"),
        ({"dtype": "complex"}, "dtype 'complex': expected 'int' or 'float'"),
        ({"min": -50.0, "max": 125.0}, "min or max -50, but its scale and offset reach -2.5"),
        ({"min": -2.5}, "has no 'max'"),
    ],
)
def test_a_broken_encoding_is_named(tmp_path, change: dict, message: str) -> None:
    with pytest.raises(
        TableError, match=rf"t\.json: activation_encodings: tensor 'x': .*{message}"
    ):
        v0(tmp_path, {"scale": 0.5, "offset": -5, **change})


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"scale": [1, 2], "offset": [0]}, "2 scales and 1 offsets"),
        ({"scale": []}, "has no 'offset'"),
        ({"scale": [], "offset": []}, "has 0 scales, 0 offsets"),
        ({"scale": [1]}, "has no 'offset'"),
        ({"enc_type": "PER_TENSOR", "scale": [1, 2], "offset": [0, 0]}, "is PER_TENSOR and has 2"),
        ({"enc_type": "VECTOR", "scale": [1], "offset": [0]}, "enc_type 'VECTOR': expected one of"),
        ({"enc_type": "PER_BLOCK", "scale": [1], "offset": [0]}, "has no 'block_size'"),
        ({"scale": [1], "offset": [0], "zero_point_shift": [0.5]}, "between two codes"),
        ({"scale": [[1], [2, 3]], "offset": [0]}, "'scale': expected numbers"),
        ({"bw": 10**30, "is_sym": True, "scale": [1]}, "expected a number of bits"),
    ],
)
def test_a_broken_1_0_0_encoding_is_named(tmp_path, encoding: dict, message: str) -> None:
    with pytest.raises(TableError, match=rf"t\.json: param_encodings: tensor 'x': .*{message}"):
        v1(tmp_path, **encoding)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ({"output_dtype": "uint99", "y_scale": 1}, "output_dtype 'uint99': no type"),
        ({"output_dtype": "uint8"}, "has no 'y_scale'"),
        ({"output_dtype": "uint8", "y_scale": [1, 2]}, "2 scales and no axis"),
        ({"output_dtype": "uint8", "y_scale": 1, "axis": 0}, "expected one for each channel"),
        ({"output_dtype": "uint8", "y_scale": [1], "block_size": 2}, "no axis that they run along"),
        (
            {"output_dtype": "uint8", "y_scale": [1, 2], "axis": 0, "y_zero_point": [1]},
            "expected the same shape",
        ),
        ({"output_dtype": "uint8", "y_scale": [[1]], "axis": 3, "block_size": 2}, "axis 3 of 2"),
        ({"output_dtype": "uint8", "y_scale": 1, "meta": 2}, "has 'meta'; known are axis,"),
        (
            {
                "output_dtype": "int4",
                "axis": 0,
                "block_size": 2,
                "per_block_int_scale": [[1, 2]],
                "per_channel_float_scale": [[1, 2, 3]],
            },
            "has block scales",
        ),
        (
            {
                "output_dtype": "int4",
                "axis": 0,
                "block_size": 2,
                "per_block_int_scale": [[0, 2]],
                "per_channel_float_scale": [[1, 2]],
            },
            "block scale 0: expected 1",
        ),
    ],
)
def test_a_broken_2_0_0_encoding_is_named(tmp_path, encoding: dict, message: str) -> None:
    with pytest.raises(TableError, match=rf"t\.json: tensor 'x': .*{message}"):
        v2(tmp_path, **encoding)


def test_a_bit_width_alone_is_no_range(tmp_path) -> None:
    with pytest.raises(TableError, match="tensor 'x': has neither min and max nor scale and offs"):
        v0(tmp_path, {})


def test_a_tensor_in_both_sections_is_refused(tmp_path) -> None:
    said = [{"bitwidth": 8, "scale": 1, "offset": 0}]
    content = {"activation_encodings": {"x": said}, "param_encodings": {"x": said}}
    with pytest.raises(TableError, match="tensor 'x' is there twice"):
        RangeTable.read(file(tmp_path, content))


def test_channels_have_to_agree(tmp_path) -> None:
    one = {"scale": 1, "offset": 0}
    with pytest.raises(TableError, match="is a list; expected one number for each channel"):
        v0(tmp_path, one, {"scale": [1, 2], "offset": 0})
    with pytest.raises(TableError, match="'bitwidth' differs between channels"):
        v0(tmp_path, one, {**one, "bitwidth": 4})
    with pytest.raises(TableError, match="is symmetric in some channels and not in others"):
        v0(tmp_path, one, {**one, "is_symmetric": "True"})
