"""ai.onnx.ml: features and labels against onnxruntime."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import InputError, ModelError

DOMAIN = "ai.onnx.ml"
rng = np.random.default_rng(3)


@pytest.fixture
def check_ml(check):
    return partial(check, domain=DOMAIN)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-3, 3, shape).astype(np.float32)


def ints(*shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape)


def text(*words: Any) -> np.ndarray:
    return np.array(words, dtype=object)


NAN = float("nan")
# Sums of four terms in another order.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

SELECTIONS: list[tuple[np.ndarray, np.ndarray]] = [
    (floats(3, 4), np.array([0, 2, 2])),
    (floats(2, 3, 4), np.array([[1, 3]])),
    (floats(4), np.array([1, 3])),
    (ints(2, 3), np.array([2])),
    (text(["a", "b"], ["c", "d"]), np.array([1])),
]


@pytest.mark.parametrize(("x", "index"), SELECTIONS)
def test_features_are_selected(check_ml, x, index) -> None:
    check = check_ml
    check("ArrayFeatureExtractor", 1, [x, index], {})


def test_features_become_binary_above_a_threshold(check_ml) -> None:
    check = check_ml
    check("Binarizer", 1, [floats(3, 4)], {"threshold": 0.5})
    check("Binarizer", 1, [np.array([-1, 0, 1], np.float32)], {})


@pytest.mark.parametrize("widths", [[2, 4], [3, 2]])
def test_features_of_several_inputs_are_joined(check_ml, widths) -> None:
    check = check_ml
    check("FeatureVectorizer", 1, [floats(3, 2), floats(3, 4)], {"inputdimensions": widths})
    check("FeatureVectorizer", 1, [floats(2), floats(4)], {"inputdimensions": widths})
    check("FeatureVectorizer", 1, [ints(3, 2), ints(3, 4)], {"inputdimensions": widths})


IMPUTATIONS: list[tuple[np.ndarray, dict[str, Any]]] = [
    (
        np.array([[1, NAN], [NAN, 2]], np.float32),
        {"imputed_value_floats": [7.0, 8.0], "replaced_value_float": NAN},
    ),
    (np.array([[1, 0], [0, 2]], np.float32), {"imputed_value_floats": [7.0]}),
    (np.array([[1, -1]]), {"imputed_value_int64s": [7, 8], "replaced_value_int64": -1}),
    (np.array([1, 0, 3], np.float32), {"imputed_value_floats": [7.0, 8.0, 9.0]}),
]


@pytest.mark.parametrize(("x", "attributes"), IMPUTATIONS)
def test_missing_features_are_imputed(check_ml, x, attributes) -> None:
    check = check_ml
    check("Imputer", 1, [x], attributes)


NUMBERS = [
    floats(3, 4),
    rng.normal(size=(3, 4)),
    ints(3, 4),
    ints(3, 4).astype(np.int32),
    floats(4),
]


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_rows_are_normalized(check_ml, norm) -> None:
    check = check_ml
    for x in (*NUMBERS, np.zeros((2, 3), np.float32)):
        check("Normalizer", 1, [x], {"norm": norm}, **CLOSE)


def test_features_are_scaled(check_ml) -> None:
    check = check_ml
    for x in NUMBERS:
        each = {"scale": [1.0, 2.0, 3.0, 4.0], "offset": [0.1, 0.2, 0.3, 0.4]}
        check("Scaler", 1, [x], each, **CLOSE)
        check("Scaler", 1, [x], {"scale": [2.0], "offset": [0.5]}, **CLOSE)


def test_categories_become_one_hot(check_ml) -> None:
    check = check_ml
    numbers: dict[str, Any] = {"cats_int64s": [2, 1, 5]}
    for x in (np.array([1, 2, 7]), np.array([[1.5, 2]], np.float32), np.array([[5.0, -1]])):
        check("OneHotEncoder", 1, [x], numbers)
    check("OneHotEncoder", 1, [text("a", "c", "b")], {"cats_strings": ["b", "a"]})
    check("OneHotEncoder", 1, [np.array([1, 2])], numbers | {"zeros": 0})


def test_a_category_that_is_not_allowed_is_refused() -> None:
    operator = ops.find(DOMAIN, "OneHotEncoder", 1)
    assert operator is not None
    with pytest.raises(InputError, match="none of the categories"):
        operator.function(torch.tensor([9]), **operator.bind({"cats_int64s": [1], "zeros": 0}))


MAPPER: dict[str, Any] = {"cats_strings": ["a", "b", "a"], "cats_int64s": [4, 5, 6]}


def test_categories_are_mapped_both_ways(check_ml) -> None:
    check = check_ml
    check("CategoryMapper", 1, [text("a", "x")], MAPPER | {"default_int64": 9})
    check("CategoryMapper", 1, [np.array([[4, 7]])], MAPPER | {"default_string": "q"})
    check("CategoryMapper", 1, [np.array([[4, 7]])], MAPPER)


ENCODINGS: list[tuple[int, np.ndarray, dict[str, Any]]] = [
    (1, text("a", "x", "b"), {"classes_strings": ["a", "b", "a"]}),
    (1, np.array([1, 0, 5, -1]), {"classes_strings": ["a", "b"], "default_string": "z"}),
    (2, text("a", "x"), {"keys_strings": ["a", "b", "a"], "values_int64s": [4, 5, 6]}),
    (2, text("a", "x"), {"keys_strings": ["a", "b"], "values_floats": [4.0, 5.0]}),
    (2, text(["a", "x"]), {"keys_strings": ["a", "b"], "values_strings": ["A", "B"]}),
    (2, np.array([1, 2, 3]), {"keys_int64s": [1, 2], "values_strings": ["A", "B"]}),
    (2, np.array([[1, 3]]), {"keys_int64s": [1], "values_floats": [0.5], "default_float": 9.0}),
    (2, np.array([1, 2, 3]), {"keys_int64s": [1, 2, 1], "values_int64s": [5, 6, 7]}),
    (2, np.array([1, NAN], np.float32), {"keys_floats": [1.0, NAN], "values_int64s": [5, 6]}),
    (2, np.array([0.1, 3], np.float32), {"keys_floats": [1.0, 0.1], "values_floats": [2.0, 3.0]}),
    (4, np.array([1, NAN], np.float32), {"keys_floats": [NAN, NAN], "values_int64s": [5, 6]}),
    (
        4,
        np.array([1, 0.1, NAN]),
        {
            "keys_tensor": np.array([0.1, NAN]),
            "values_tensor": np.array([7.0, 8.0]),
            "default_tensor": np.array([-2.0]),
        },
    ),
    (
        4,
        text("a", "x"),
        {
            "keys_tensor": text("a"),
            "values_tensor": np.array([3], np.int16),
            "default_tensor": np.array([5], np.int16),
        },
    ),
    (4, np.array([1.0, 2.0]), {"keys_tensor": np.array([1.0]), "values_tensor": text("p")}),
]


@pytest.mark.parametrize(("opset", "x", "attributes"), ENCODINGS)
def test_labels_are_encoded(check_ml, opset, x, attributes) -> None:
    check = check_ml
    check("LabelEncoder", opset, [x], attributes)


@pytest.mark.parametrize(
    ("op_type", "attributes", "error", "message"),
    [
        ("LabelEncoder", {"keys_int64s": [1]}, ModelError, "no values"),
        ("LabelEncoder", {"keys_int64s": [1], "values_int64s": [1, 2]}, ModelError, "1 keys and 2"),
        ("OneHotEncoder", {}, ModelError, "neither"),
    ],
)
def test_tables_that_do_not_fit_are_refused(op_type, attributes, error, message) -> None:
    operator = ops.find(DOMAIN, op_type, 4)
    assert operator is not None
    with pytest.raises(error, match=message):
        operator.bind(attributes)


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("Normalizer", {"norm": "MAX"}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
        ("Scaler", {"scale": [2.0], "offset": [0.5]}),
        ("FeatureVectorizer", {"inputdimensions": [5]}),
    ],
)
def test_gradients_of_features_are_finite_differences(op_type, attributes) -> None:
    operator = ops.find(DOMAIN, op_type, 1)
    assert operator is not None
    x = torch.from_numpy(floats(3, 4)).double().requires_grad_()
    function = partial(operator.function, **operator.bind(attributes))
    # The operators compute in float32, which a step of 1e-2 keeps below 1e-4.
    torch.autograd.gradcheck(function, x, eps=1e-2, atol=5e-3, rtol=1e-2)
