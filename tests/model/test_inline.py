"""Host operators written as expressions are what their functions compute."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from qwrap.model.host import HOST_OPERATORS, SCALAR, HostType
from qwrap.model.inline import inline

small = st.integers(-5, 5)
operand = st.one_of(
    small, st.lists(small, min_size=1, max_size=1), st.lists(small, min_size=3, max_size=3)
)
# For each input whether its text is a local or, as for constants, a literal.
local = st.lists(st.booleans(), min_size=3, max_size=3)


def evaluate(op_type: str, inputs: list[Any], local: list[bool], **attributes: Any) -> Any:
    texts = [
        f"v{i}" if name and x is not None else repr(x)
        for i, (x, name) in enumerate(zip(inputs, local, strict=False))
    ]
    types = [
        None if x is None else HostType(len(x)) if isinstance(x, list) else SCALAR for x in inputs
    ]
    text = inline(op_type, texts, types, attributes)
    assert text is not None
    return eval(text, {f"v{i}": x for i, x in enumerate(inputs)})


def check(op_type: str, inputs: list[Any], local: list[bool], **attributes: Any) -> None:
    expected = HOST_OPERATORS[op_type].function(*inputs, **attributes)
    mine = evaluate(op_type, inputs, local, **attributes)
    assert mine == expected
    assert type(mine) is type(expected)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Equal", "Less", "GreaterOrEqual"])
@given(a=operand, b=operand, local=local)
def test_elementwise(op_type: str, a: Any, b: Any, local: list[bool]) -> None:
    check(op_type, [a, b], local)


@pytest.mark.parametrize("divisor", [1, 2, [3], [1, 2, 5]])
@given(a=operand, name=st.booleans())
def test_division_by_a_positive_constant(divisor: Any, a: Any, name: bool) -> None:
    check("Div", [a, divisor], [name, False])


@pytest.mark.parametrize("divisor", [-2, 0, [1, 0, 1]])
def test_division_by_anything_else_is_left_to_the_function(divisor: Any) -> None:
    kind = HostType(3) if isinstance(divisor, list) else SCALAR
    assert inline("Div", ["v0", repr(divisor)], [SCALAR, kind], {}) is None


def test_division_by_a_list_that_is_not_known_is_left_to_the_function() -> None:
    assert inline("Div", ["v0", "v1"], [SCALAR, HostType(2)], {}) is None


@given(a=operand, b=operand, c=operand, local=local)
def test_where(a: Any, b: Any, c: Any, local: list[bool]) -> None:
    condition = [x > 0 for x in a] if isinstance(a, list) else a > 0
    check("Where", [condition, b, c], local)


@given(
    data=st.lists(small, max_size=6),
    start=st.sampled_from([-(2**63), -7, -2, 0, 1, 6, 2**63 - 1]),
    end=st.sampled_from([-(2**63), -7, -2, 0, 1, 6, 2**63 - 1]),
    step=st.integers(1, 3),
)
def test_slices_forwards(data: list[int], start: int, end: int, step: int) -> None:
    check("Slice", [data, [start], [end], [0], [step]], [True] + [False] * 4)
    check("Slice", [data, [start], [end], None], [True] + [False] * 3)


@given(data=st.lists(small, min_size=1, max_size=4), local=local)
def test_the_rest_of_the_table(data: list[int], local: list[bool]) -> None:
    check("Concat", [data, [3], []], local, axis=0)
    check("Gather", [data, 0], [local[0], False])
    check("Gather", [data, [-1, 0]], [local[0], False])
    check("Unsqueeze", [data[0], [0]], [True, False])
    check("Squeeze", [data[:1], [0]], [True, False])
    check("Reshape", [data, [-1]], [True, False])
    check("Reshape", [data[:1], []], [True, False])
    check("Reshape", [data[0], [1]], [True, False])
    check("Identity", [data], [True])
    check("Cast", [data], [True], to=TensorProto.INT64)
    check("Cast", [[x > 0 for x in data]], [True], to=TensorProto.INT32)


@pytest.mark.parametrize("length", [-1, 9])
def test_lists_of_unknown_or_great_length_are_left_to_the_function(length: int) -> None:
    assert inline("Mul", ["v0", "v1"], [HostType(length), HostType(1)], {}) is None
