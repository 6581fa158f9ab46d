"""Operators on unsigned integers, 8-bit floats and text, against onnxruntime."""

import pickle
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import qwrap
from qwrap import backend, ops
from qwrap.errors import UnsupportedOpError
from qwrap.ops import unsigned
from qwrap.ops.carriers import CARRY, suited
from qwrap.ops.matmul import matmul_in_limbs

rng = np.random.default_rng(3)
UNSIGNED = [np.uint16, np.uint32, np.uint64]
WORDS = ["a", "", "ä", "bee", "a", "Z"]


def numbers(dtype: Any, *shape: int) -> np.ndarray:
    """Values over the whole range of a type, some of them equal."""
    if dtype is object:
        return np.array(rng.choice(WORDS, shape), object)
    if dtype is np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return (rng.integers(0, 9, shape) * (np.iinfo(dtype).max // 8)).astype(dtype)


def const(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def node(op_type: str, *inputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, ["y"], **attributes)


MOVES = [
    (node("Reshape", "x", "c"), const("c", 4, -1)),
    (node("Transpose", "x", perm=[2, 0, 1]), None),
    (node("Squeeze", "x", "c"), const("c", 1)),
    (node("Unsqueeze", "x", "c"), const("c", 0, -1)),
    (node("Expand", "x", "c"), const("c", 2, 2, 3, 4)),
    (node("Tile", "x", "c"), const("c", 1, 3, 2)),
    (node("Flatten", "x", axis=2), None),
    (node("Identity", "x"), None),
    (node("Concat", "x", "z", axis=-1), None),
    (node("Split", "x", "c", axis=2), const("c", 4)),
    (node("Slice", "x", "c", "c", "c"), const("c", 0)),
    (node("Gather", "x", "c", axis=2), const("c", 3, -1, 0)),
    (node("GatherElements", "x", "c"), numpy_helper.from_array(np.ones((1, 1, 4), int), "c")),
    (node("GatherND", "x", "c"), const("c", 1, 0, -1)),
    (node("Where", "b", "x", "z"), numpy_helper.from_array(np.eye(3, 4)[:2, None] > 0, "b")),
]


def types_of(dtype: Any) -> int:
    return (
        TensorProto.STRING if dtype is object else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    )


@pytest.mark.parametrize(("move", "constant"), MOVES)
@pytest.mark.parametrize("dtype", [*UNSIGNED, np.bool_, object])
def test_moving_values_equals_onnxruntime(check_model, move, constant, dtype) -> None:
    feed: dict[str, Any] = {"x": numbers(dtype, 2, 1, 4)}
    if "z" in move.input:
        feed["z"] = feed["x"][::-1].copy()
    if constant is not None:
        feed[constant.name] = constant
    check_model([move], feed, {"y": types_of(dtype)}, 20)


def takes_8_bit_floats(op_type: str) -> bool:
    schema = onnx.defs.get_schema(op_type, 21)
    return any("tensor(float8e4m3fn)" in t.allowed_type_strs for t in schema.type_constraints)


@pytest.mark.parametrize(
    ("move", "constant"), [case for case in MOVES if takes_8_bit_floats(case[0].op_type)]
)
def test_8_bit_floats_move_as_their_bits_do(move, constant) -> None:
    bits = rng.integers(0, 256, (2, 1, 4)).astype(np.uint8)
    results = []
    for dtype in (ml_dtypes.float8_e4m3fn, np.uint8):
        names = [n for n in move.input if n in ("x", "z")]
        element = types_of(dtype)
        graph = helper.make_graph(
            [move],
            "moves",
            [helper.make_tensor_value_info(n, element, (2, 1, 4)) for n in names],
            [helper.make_tensor_value_info("y", element, None)],
            [] if constant is None else [constant],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        results.append(backend.prepare(model).run([bits.view(dtype)] * len(names))[0])
    assert results[0].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(results[0].view(np.uint8), results[1])


BINARY = ["Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "BitwiseAnd", "BitwiseXor"]
COMPARISONS = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]


@pytest.mark.parametrize("op_type", [*BINARY, *COMPARISONS])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, *UNSIGNED])
# numpy, the oracle where onnxruntime has no kernel, warns of what is to wrap.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_arithmetic_equals_onnxruntime(check_model, op_type: str, dtype: type) -> None:
    a, b = numbers(dtype, 2, 30), numbers(dtype, 30)
    if op_type in ("Div", "Mod"):
        b[b == 0] = 3
    result = TensorProto.BOOL if op_type in COMPARISONS else types_of(dtype)
    check_model([node(op_type, "a", "b")], {"a": a, "b": b}, {"y": result}, 19)


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_reductions_and_ranks_equal_the_oracle(check_model, dtype: type) -> None:
    x = {"x": numbers(dtype, 5, 6)}
    own, index = types_of(dtype), TensorProto.INT64
    sums = ("ReduceSum", "ReduceProd", "ReduceSumSquare")  # in numpy, the oracle, always uint64
    extremes = () if dtype is np.uint16 else ("ReduceMax", "ReduceMin")  # which ONNX leaves out
    for op_type in (*extremes, *(sums if dtype is np.uint64 else ())):
        reduction = node(op_type, "x", "c", keepdims=0)
        check_model([reduction], x | {"c": const("c", 1)}, {"y": own}, 20)
    for last in (0, 1):
        for op_type in ("ArgMax", "ArgMin"):
            attributes = {"axis": 1, "select_last_index": last}
            check_model([node(op_type, "x", **attributes)], x, {"y": index}, 13)
    topk = helper.make_node("TopK", ["x", "c"], ["y", "i"], axis=1, largest=0)
    check_model([topk], x | {"c": const("c", 4)}, {"y": own, "i": index}, 11)


@pytest.mark.parametrize("op_type", ["ReduceLogSum", "ReduceLogSumExp", "ReduceL2", "ReduceMean"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_reductions_of_integers_stay_integers(check, op_type: str, dtype: type) -> None:
    x = np.array([[1, 5, 5], [2, 3, 4], [7, 7, 7]], dtype)
    check(op_type, 13, [x], {"axes": [1], "keepdims": 0})
    check(op_type, 18, [x, np.array([0])], {})


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_unsigned_integers_have_no_sign(dtype: type) -> None:
    x = torch.from_numpy(numbers(dtype, 3, 5))
    for op_type in ("Abs", "PRelu"):
        carried = suited(ops.find("", op_type, 16), op_type, [types_of(dtype)]).function
        assert torch.equal(carried(*(x, x)[: 1 + (op_type == "PRelu")]), x)
    sign = suited(ops.find("", "Sign", 13), "Sign", [types_of(dtype)]).function
    np.testing.assert_array_equal(sign(x).numpy(), np.sign(x.numpy()))
    norm = suited(ops.find("", "ReduceL1", 18), "ReduceL1", [types_of(dtype)]).function
    np.testing.assert_array_equal(norm(x, [1]).numpy(), x.numpy().sum(1, dtype, keepdims=True))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.uint64])
def test_clipping_equals_onnxruntime(check_model, dtype: type) -> None:
    top = np.iinfo(dtype).max
    limits = {
        "low": numpy_helper.from_array(np.array(3, dtype), "low"),
        "high": numpy_helper.from_array(np.array(top - 5, dtype), "high"),
    }
    x = {"x": numbers(dtype, 40)}
    check_model([node("Clip", "x", "low", "high")], x | limits, {"y": types_of(dtype)}, 13)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64, np.int32, np.int64])
def test_matrix_products_of_integers_wrap_as_in_onnxruntime(check_model, dtype: type) -> None:
    a, b = numbers(dtype, 3, 4), numbers(dtype, 4, 2)
    check_model([node("MatMul", "a", "b")], {"a": a, "b": b}, {"y": types_of(dtype)}, 13)
    if np.dtype(dtype).itemsize == 4:  # the oracle computes wider ones in float64
        check_model([node("Gemm", "a", "b")], {"a": a, "b": b}, {"y": types_of(dtype)}, 13)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_products_in_limbs_equal_integer_products(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    torch.manual_seed(0)
    a = torch.randint(info.min, info.max, (2, 3, 100), dtype=dtype)
    b = torch.randint(info.min, info.max, (100, 4), dtype=dtype)
    assert torch.equal(matmul_in_limbs(a, b), torch.matmul(a, b))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("exponent", [-1, 0, 1, 2, 3, 4])
def test_integer_powers_wrap_as_in_onnxruntime(check_model, dtype: type, exponent: int) -> None:
    top = 2**31 - 1 if exponent in (2, 3) else 2**7  # others it converts from float64, undefined
    x = rng.integers(1 - top, top, 50).astype(dtype)
    x[x == 0] = 1  # 1 / 0 is infinite, and undefined as an integer
    y = np.array(exponent, np.int32)
    for constant in (y, numpy_helper.from_array(y, "y")):
        power = helper.make_node("Pow", ["x", "y"], ["z"])
        check_model([power], {"x": x, "y": constant}, {"z": types_of(dtype)}, 15)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_shifts_equal_onnxruntime(check_model, direction: str, dtype: type) -> None:
    x, by = numbers(dtype, 70), np.arange(70).astype(dtype)
    by %= np.iinfo(dtype).bits
    shift = node("BitShift", "x", "by", direction=direction)
    check_model([shift], {"x": x, "by": by}, {"y": types_of(dtype)}, 11)


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_an_unsigned_exponent_keeps_the_type_of_the_base(check_model, dtype: type) -> None:
    base, exponent = np.array([2, -3, 5], np.int64), np.array([10, 3, 0], dtype)
    power = node("Pow", "a", "b")
    check_model([power], {"a": base, "b": exponent}, {"y": TensorProto.INT64}, 15)


WIDE = st.integers(0, 2**64 - 1) | st.integers(0, 9) | st.integers(2**63 - 2, 2**63 + 2)


def as_int64(value: int) -> torch.Tensor:
    return torch.from_numpy(np.array([value], np.uint64)).view(torch.int64)


def as_uint64(value: torch.Tensor) -> int:
    return int(value.view(torch.uint64).numpy()[0])


@given(a=WIDE, b=WIDE.filter(bool))
def test_division_of_uint64_is_exact(a: int, b: int) -> None:
    assert as_uint64(unsigned.divide(as_int64(a), as_int64(b))) == a // b
    assert as_uint64(unsigned.remainder(as_int64(a), as_int64(b))) == a % b


@given(x=WIDE, by=st.integers(0, 80))
def test_right_shifts_of_uint64_fill_with_zeros(x: int, by: int) -> None:
    assert as_uint64(unsigned.shift(as_int64(x), as_int64(by), direction="RIGHT")) == x >> by


def test_equality_of_text_equals_onnxruntime(check_model) -> None:
    a, b = numbers(object, 3, 5), numbers(object, 5)
    check_model([node("Equal", "a", "b")], {"a": a, "b": b}, {"y": TensorProto.BOOL}, 19)


def test_text_has_a_size_and_a_shape(check_model) -> None:
    x = {"x": numbers(object, 3, 5)}
    check_model([node("Size", "x")], x, {"y": TensorProto.INT64}, 19)
    check_model([node("Shape", "x")], x, {"y": TensorProto.INT64}, 19)


def test_constants_may_be_text(check_model) -> None:
    words = numpy_helper.from_array(np.array(["a", "b"], object), "words")
    x = {"x": np.array(["a", "c"], object)}
    check_model([node("Concat", "x", "words", axis=0)], x | {"words": words}, {"y": 8}, 13)


def test_text_is_padded_with_text() -> None:
    operator = suited(ops.find("", "Pad", 19), "Pad", [TensorProto.STRING])
    x = np.array(["a", "b"], object)
    assert operator.function(x, [1, 1], "*").tolist() == ["*", "a", "b", "*"]
    assert operator.function(x, [0, 1]).tolist() == ["a", "b", ""]


def test_arithmetic_on_text_is_refused() -> None:
    operator = suited(ops.find("", "Max", 13), "Max", [TensorProto.STRING])
    x = np.array(["a", "b"], object)
    with pytest.raises(UnsupportedOpError, match="Max of text"):
        operator.function(x, x)


def test_large_padding_of_uint64_is_exact() -> None:
    operator = suited(ops.find("", "Pad", 19), "Pad", [TensorProto.UINT64])
    x = torch.tensor([1], dtype=torch.uint64)
    assert operator.function(x, [0, 1], 2**63).tolist() == [1, 2**63]


def test_ordinary_types_cost_nothing() -> None:
    operator = ops.find("", "Add", 14)
    assert suited(operator, "Add", [TensorProto.FLOAT, TensorProto.FLOAT]) is operator


def test_unknown_types_are_told_by_the_tensors() -> None:
    add = suited(ops.find("", "Add", 14), "Add", [None, TensorProto.FLOAT]).function
    assert add(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]
    large = torch.tensor([65535], dtype=torch.uint16)
    assert add(large, large).tolist() == [65534]


def test_every_listed_operator_exists() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(CARRY) <= known


def unsigned_model() -> onnx.ModelProto:
    text = (
        "<ir_version: 10, opset_import: ['': 19]> g (uint16[4] x) => (uint16[4] y) {y = Add(x, x)}"
    )
    return onnx.parser.parse_model(text.replace("'", '"'))


def test_models_of_unsigned_integers_are_pickled_and_compiled() -> None:
    model = qwrap.load(unsigned_model())
    x = torch.tensor([1, 2, 40000, 65535], dtype=torch.uint16)
    assert model(x).tolist() == [2, 4, 14464, 65534]
    assert pickle.loads(pickle.dumps(model))(x).tolist() == [2, 4, 14464, 65534]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(x).tolist() == [2, 4, 14464, 65534]


def test_8_bit_floats_that_move_keep_their_gradient() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    concat = suited(ops.find("", "Concat", 13), "Concat", [TensorProto.FLOAT8E5M2]).function
    concat(x.to(torch.float8_e5m2), x.to(torch.float8_e5m2), axis=0).float().sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))
