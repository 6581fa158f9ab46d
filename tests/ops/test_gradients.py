"""Autograd of every operator against central differences in float64.

Of the reference implementation, on the examples of the onnx package; and of what qwrap itself
computes, which ``test_revisions`` compares with onnxruntime, on every revision and variant.
"""

import re
import warnings
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator
from oracles.families import REVISIONS
from oracles.gradients import check, is_float, leaves, with_floats
from oracles.variants import GENERATORS, SIZES, Variant, build, inputs_of

with warnings.catch_warnings():
    # Importing the cases computes what they expect, divisions by zero and overflows included.
    warnings.simplefilter("ignore")
    CASES = {
        case.name: case
        for case in load_model_tests(kind="node")
        if "_expanded" not in case.name  # bodies of functions: the same values again
    }

# Operator -> why the reference cannot be differentiated by differences. What qwrap itself computes
# is then: other tests compare it with the reference or with onnxruntime.
ROUNDED = "the reference computes in float32 whatever its inputs"
ABSENT = "the reference has none"
OWN_SLOPE = {
    "Adam": ROUNDED,
    "AffineGrid": ROUNDED,
    "CausalConvWithState": ROUNDED,
    "DeformConv": ROUNDED,
    "DynamicQuantizeLinear": ROUNDED,
    "Erf": ROUNDED,
    "Gelu": ROUNDED,
    "GridSample": ROUNDED,
    "GroupNormalization": ROUNDED,
    "LinearAttention": ROUNDED,
    "MeanVarianceNormalization": "the body of the function has constants in float32",
    "MaxUnpool": "the reference places by output_shape otherwise than onnxruntime",
    "Resize": "coordinates are in float32, in the order of onnxruntime's operations",
    "Scan": "the reference takes no Scan-8",
    "Scatter": ABSENT,
}

# Name of a case -> why there is nothing to compare.
WITHOUT_SLOPE = {
    r"test_(bernoulli|training_dropout)(?!.*zero_ratio).*": "random",
    r"test_mod_float_edge_cases.*": "infinite inputs",
    r"test_(average|lp|max)pool_3d_default": "98 304 inputs, some of them closer than a step",
}

# Operator -> why its variants have no slope in float64.
NOT_IN_DOUBLE = {
    "BitCast": "bits have no slope",
    "DequantizeLinear": "multiplies in float32 whatever its inputs; the examples do not notice",
}

# Operator -> inputs that are floats but count or index.
STILL = {"OneHot": (0, 1)}


def arrays(value: Any) -> Any:
    """What a data set of a case holds, as arrays and lists."""
    for kind, convert in (
        (onnx.TensorProto, numpy_helper.to_array),
        (onnx.SequenceProto, numpy_helper.to_list),
        (onnx.OptionalProto, numpy_helper.to_optional),
    ):
        if isinstance(value, kind):
            return convert(value)
    return value


def data_of(name: str) -> tuple[list[Any], list[Any]]:
    inputs, outputs = CASES[name].data_sets[0]
    return [arrays(value) for value in inputs], [arrays(value) for value in outputs]


def has_floats(name: str) -> bool:
    return all(any(map(is_float, leaves(values))) for values in data_of(name))


def operator_of(name: str) -> str:
    """The operator that a case is about; some make its input first."""
    nodes = CASES[name].model.graph.node
    return nodes[-1 if nodes[0].op_type in ("Constant", "SequenceConstruct") else 0].op_type


def excluded(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in WITHOUT_SLOPE)


DIFFERENTIABLE = [name for name in CASES if has_floats(name)]
COMPARED = [name for name in DIFFERENTIABLE if not excluded(name)]


@pytest.mark.parametrize("name", COMPARED)
def test_gradient_equals_slope_of_the_reference(name: str) -> None:
    model, op_type = CASES[name].model, operator_of(name)
    inputs, _ = data_of(name)
    names = [value.name for value in model.graph.input]
    in_double = with_floats(model, onnx.TensorProto.DOUBLE)

    def reference(values: list[Any]) -> list[Any]:
        return ReferenceEvaluator(in_double).run(None, dict(zip(names, values, strict=False)))

    check(model, inputs, None if op_type in OWN_SLOPE else reference, STILL.get(op_type, ()))


def is_comparable(variant: Variant) -> bool:
    """Whether a variant is about float32: others are the same in float64."""
    kinds = [a.dtype.name for a in inputs_of(variant, SIZES[0]) if a is not None]
    return "float32" in kinds and not variant.random and not {"float16", "object"} & {*kinds}


@pytest.mark.parametrize(
    ("op_type", "revision"), [pair for pair in REVISIONS if pair[0] not in NOT_IN_DOUBLE]
)
def test_gradient_equals_slope_at_every_revision(op_type: str, revision: int) -> None:
    for variant in filter(is_comparable, GENERATORS[op_type](revision)):
        inputs = inputs_of(variant, SIZES[0])
        if op_type == "LayerNormalization":
            variant.outputs = 1  # by default its statistics are float32
        model = build(op_type, revision, variant, [inputs], dynamic=True)
        given = [a for i, a in enumerate(inputs) if a is not None and i not in variant.constants]
        check(model, given, None, STILL.get(op_type, ()))


def test_every_operator_with_floats_in_and_out_is_compared_or_random() -> None:
    compared = set(map(operator_of, COMPARED))
    assert set(map(operator_of, DIFFERENTIABLE)) - compared == {"Bernoulli"}
    assert len(compared) >= 150


@pytest.mark.parametrize("pattern", WITHOUT_SLOPE)
def test_every_reason_leaves_something_out(pattern: str) -> None:
    assert any(re.fullmatch(pattern, name) for name in DIFFERENTIABLE)
