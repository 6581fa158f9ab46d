"""What is registered, and that every operator has a case."""

import inspect
import re
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from qwrap import ops


def test_every_registered_operator_has_a_case_against_an_oracle() -> None:
    texts = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.rglob("test_*.py")]
    covered = set(re.findall(r'"(\w+)"', "\n".join(texts)))
    assert {op_type for _, op_type, _ in ops.operators()} <= covered


def schemas() -> dict[tuple[str, str, int], Any]:
    """What onnxruntime declares beyond onnx, overridden by what onnx declares."""
    known = (*get_all_operator_schema(), *onnx.defs.get_all_schemas_with_history())
    return {(schema.domain, schema.name, schema.since_version): schema for schema in known}


def test_every_registered_revision_exists() -> None:
    assert set(ops.operators()) <= set(schemas())


def test_functions_return_a_tuple_where_the_schema_has_several_outputs() -> None:
    declared = schemas()
    for key in ops.operators():
        operator = ops.find(*key)
        assert operator is not None
        outputs = declared[key].outputs
        variadic = bool(outputs) and outputs[-1].option.name == "Variadic"
        assert operator.returns_tuple == (len(outputs) > 1 or variadic), key


def test_keywords_are_attributes_of_the_schema() -> None:
    declared = schemas()
    wanted = {"output_count", "device", "dtype", "element_type"}
    for key in ops.operators():
        operator = ops.find(*key)
        assert operator is not None
        if key[0] == "com.microsoft":
            names = set(inspect.getfullargspec(operator.function).kwonlyargs) - wanted
            assert names <= set(declared[key].attributes), key
            assert names | operator.ignored >= set(declared[key].attributes), key


def test_a_model_uses_the_newest_revision_not_after_its_opset() -> None:
    assert ops.revision("", "Softmax", 12) == 11
    assert ops.revision("", "Softmax", 17) == 13
    assert ops.find("", "Softmax", 12) is not ops.find("", "Softmax", 13)


def test_an_unknown_operator_is_not_found() -> None:
    assert ops.find("", "NoSuchOperator", 17) is None
    assert ops.find("com.example", "Relu", 1) is None


def test_keywords_leave_out_what_never_changes_the_result() -> None:
    conv = ops.find("", "Conv", 11)
    assert conv is not None
    assert conv.keywords({"kernel_shape": [3, 3], "group": 2}) == {"group": 2}
