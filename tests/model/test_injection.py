"""Names and attributes of a file are data: none of them runs as code."""

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from qwrap.errors import ModelError
from qwrap.model import UsePoint, ValuePoint, load
from qwrap.model.expressions import literal

Build = Callable[..., onnx.ModelProto]
PAYLOAD = "(_ for _ in ()).throw(SystemExit('ran'))"
NAMES = [
    f"'); {PAYLOAD} #",
    f'"); {PAYLOAD} #',
    f'"]; {PAYLOAD} #',
    f"\n    {PAYLOAD}\n",
    f"\r    {PAYLOAD}\r",
    f"\u2028    {PAYLOAD}\x0c\x1c\x85",
    "\\",
    "\\'\\\"\\",
    "a.b/c.d",
    "{self}%s{}",
    "Ω≈ç√ 名前 \U0001f600",
    "__class__",
    "__init__/forward/_modules/weight",
    "self",
    "lambda",
    "/" * 50 + "x/" * 400 + "y",
    "\x00",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_harmless_everywhere(name: str, build: Build) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", name + "w"], [name + "1"], name + "/n/m"),
        helper.make_node("Relu", [name + "1"], [name + "2"], name),
        helper.make_node("Shape", [name + "2"], [name + "3"], name + "s"),
        helper.make_node("Reshape", [name + "2", name + "3"], ["y"], name + "r"),
    ]
    w = np.array([[1, -1], [2, -2]], np.float32)
    model = load(build(nodes, {"x": ["n", 2]}, initializers={name + "w": w}))
    points = [ValuePoint(name + "1"), ValuePoint("x"), UsePoint(name + "/n/m", 1)]
    model.attach({point: torch.nn.Identity() for point in points})
    seen: list[torch.Tensor] = []
    with model.watching({name + "2": seen.append}):
        assert model(torch.ones(1, 2)).tolist() == [[3.0, 0.0]]
    assert len(seen) == 1
    assert model.tensor_names[next(iter(model.state_dict()))] == name + "w"


def test_an_attribute_name_is_not_code(build: Build) -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], "n", axis=0)
    node.attribute.add(name=f"a={PAYLOAD},b", i=1, type=onnx.AttributeProto.INT)
    with pytest.raises(ModelError, match=r"node 'n' .* has no attribute"):
        load(build([node], {"x": [2]}))


def test_an_attribute_name_of_an_operator_without_schema_is_not_code(build: Build) -> None:
    model = ir.from_proto(build([helper.make_node("Softmax", ["x"], ["y"], "n")], {"x": [2]}))
    model.graph.node(0).attributes.add(ir.AttrString(f"b={PAYLOAD}, axis", "1"))
    with pytest.raises(ModelError, match="node 'n'"):
        load(model)


@pytest.mark.parametrize("start", [f"0]; {PAYLOAD} #", "0"])
def test_a_shape_attribute_is_not_code(start: str, build: Build) -> None:
    node = helper.make_node("Shape", ["x"], ["y"], "n", start=start)
    with pytest.raises(ModelError, match="'start' is of type STRING"):
        load(build([node], {"x": [2]}))


def test_attribute_text_arrives_as_it_is(build: Build) -> None:
    equation = f"'+{PAYLOAD}+'"
    node = helper.make_node("Einsum", ["x"], ["y"], "n", equation=equation)
    model = load(build([node], {"x": None}))  # of a rank that nobody could hold against the text
    assert f"equation={equation!r}" in model.source
    with contextlib.suppress(Exception):  # SystemExit would pass
        model(torch.ones(2))


def test_a_scope_written_by_the_dynamo_exporter_is_not_evaluated(build: Build) -> None:
    for scopes in (PAYLOAD, f"[{PAYLOAD!r}, 'x', 1]", "[" * 500, "3", "{'a': 1}", "['']"):
        node = helper.make_node("Relu", ["x"], ["y"], "n")
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        assert load(build([node], {"x": [2]}))(torch.ones(2)).tolist() == [1, 1]


def test_only_plain_data_becomes_text() -> None:
    class Text:
        def __repr__(self) -> str:
            return PAYLOAD

    class Number(int):
        __repr__ = Text.__repr__

    for value in (Text(), Number(3), [Text()], np.float32(1), torch.ones(1)):
        with pytest.raises(ModelError, match="cannot be an operator attribute"):
            literal(value)
    for value in (1, -1.5, True, None, "a'\n\"", b"\xff", [1, [2.0]], float("inf")):
        assert eval(literal(value), {"float": float}) == value
    assert literal(float("nan")) == 'float("nan")'
    assert literal(ir.DataType.FLOAT) == str(int(TensorProto.FLOAT))
