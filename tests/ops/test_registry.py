"""What is registered, and that every operator has a case."""

import re
from pathlib import Path

import onnx

from qwrap import ops


def test_every_registered_operator_has_a_case_against_an_oracle() -> None:
    texts = [p.read_text(encoding="utf-8") for p in Path(__file__).parent.rglob("test_*.py")]
    covered = set(re.findall(r'"(\w+)"', "\n".join(texts)))
    assert {op_type for _, op_type, _ in ops.operators()} <= covered


def test_every_registered_revision_exists_in_onnx() -> None:
    for domain, op_type, since in ops.operators():
        assert onnx.defs.get_schema(op_type, since, domain).since_version == since


def test_functions_return_a_tuple_where_the_schema_has_several_outputs() -> None:
    for domain, op_type, since in ops.operators():
        operator = ops.find(domain, op_type, since)
        assert operator is not None
        several = onnx.defs.get_schema(op_type, since, domain).max_output > 1
        assert operator.returns_tuple == several, (op_type, since)


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
