"""ai.onnx.ml: linear models and support vector machines against onnxruntime."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from qwrap import ops
from qwrap.errors import InputError, ModelError, UnsupportedOpError

DOMAIN = "ai.onnx.ml"
TRANSFORMS = ["NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT"]
LABELS = [{"ints": [10, 13, 16, 19]}, {"strings": ["a", "b", "c", "d"]}]
# Sums of some ten terms through saturating functions, in another order; PROBIT amplifies.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
rng = np.random.default_rng(5)


@pytest.fixture
def check_ml(check):
    return partial(check, domain=DOMAIN, **CLOSE)


def numbers(*shape: int) -> list[float]:
    return rng.uniform(-1, 1, shape).astype(np.float32).flatten().tolist()


def rows(dtype: Any = np.float32) -> np.ndarray:
    return rng.uniform(-3, 3, (7, 3)).astype(dtype)


def labels(kind: dict[str, list[Any]], count: int) -> dict[str, list[Any]]:
    return {f"classlabels_{name}": values[:count] for name, values in kind.items()}


@pytest.mark.parametrize("post_transform", TRANSFORMS)
@pytest.mark.parametrize("targets", [1, 3])
def test_linear_regression_equals_onnxruntime(check_ml, targets, post_transform) -> None:
    check = check_ml
    attributes = {"coefficients": numbers(targets, 3), "targets": targets}
    attributes |= {"post_transform": post_transform}
    check("LinearRegressor", 1, [rows()], attributes)
    check("LinearRegressor", 1, [rows()[0]], attributes | {"intercepts": numbers(targets)})


@pytest.mark.parametrize("post_transform", TRANSFORMS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(("scores", "classes"), [(1, 2), (2, 2), (4, 4)])
def test_linear_classes_equal_onnxruntime(check_ml, scores, classes, kind, post_transform) -> None:
    check = check_ml
    if scores == 1 and post_transform == "PROBIT":
        scores = 2  # of one score it is refused: onnxruntime leaves the other class undefined
    attributes = labels(kind, classes) | {"coefficients": numbers(scores, 3)}
    attributes |= {"intercepts": numbers(scores), "post_transform": post_transform}
    for dtype in (np.float32, np.int64) if post_transform == "NONE" else (np.float64,):
        check("LinearClassifier", 1, [rows(dtype)], attributes, outputs=2)


KERNELS: list[dict[str, Any]] = [
    {"kernel_type": "LINEAR", "kernel_params": [0.3, 0.2, 3.0]},
    {"kernel_type": "POLY", "kernel_params": [0.3, 0.2, 3.0]},
    {"kernel_type": "RBF", "kernel_params": [0.3, 0.2, 3.0]},
    {"kernel_type": "SIGMOID", "kernel_params": [0.3, 0.2, 3.0]},
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("one_class", [0, 1])
def test_support_vector_regression_equals_onnxruntime(check_ml, kernel, one_class) -> None:
    check = check_ml
    attributes = kernel | {"one_class": one_class, "rho": numbers(1), "n_supports": 5}
    attributes |= {"coefficients": numbers(5), "support_vectors": numbers(5, 3)}
    check("SVMRegressor", 1, [rows()], attributes)
    linear = kernel | {"kernel_type": "LINEAR", "coefficients": numbers(3), "rho": numbers(1)}
    check("SVMRegressor", 1, [rows()], linear)


def machine(classes: int, kernel: dict[str, Any], has_probabilities: bool) -> dict[str, Any]:
    counts = [2, 1, 3, 2][:classes]
    pairs, total = classes * (classes - 1) // 2, sum(counts)
    attributes = kernel | {"vectors_per_class": counts, "support_vectors": numbers(total, 3)}
    attributes |= {"coefficients": numbers(classes - 1, total), "rho": numbers(pairs)}
    if has_probabilities:
        slopes = (-np.abs(numbers(pairs))).astype(np.float32).tolist()
        attributes |= {"prob_a": slopes, "prob_b": numbers(pairs)}
    return attributes


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("has_probabilities", [False, True])
def test_support_vector_classes_equal_onnxruntime(
    check_ml, kernel, classes, has_probabilities
) -> None:
    check = check_ml
    for kind in LABELS:
        attributes = machine(classes, kernel, has_probabilities) | labels(kind, classes)
        for dtype in (np.float32, np.int64):
            check("SVMClassifier", 1, [rows(dtype)], attributes, outputs=2)


@pytest.mark.parametrize("post_transform", TRANSFORMS[1:])
@pytest.mark.parametrize("classes", [2, 3])
def test_transformed_support_vector_scores_equal_onnxruntime(
    check_ml, classes, post_transform
) -> None:
    has_probabilities = post_transform == "PROBIT"
    # Near one half the approximation takes the root of a difference of almost equal numbers.
    check = partial(check_ml, atol=1e-3) if has_probabilities else check_ml
    attributes = machine(classes, KERNELS[2], has_probabilities) | labels(LABELS[0], classes)
    attributes |= {"post_transform": post_transform}
    check("SVMClassifier", 1, [rows()], attributes, outputs=2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_linear_support_vector_classes_equal_onnxruntime(check_ml, classes, sign) -> None:
    coefficients = (sign * np.abs(numbers(classes, 3))).tolist()
    attributes = {"coefficients": coefficients, "rho": numbers(1), "kernel_params": [0.0] * 3}
    check_ml("SVMClassifier", 1, [rows()], attributes | labels(LABELS[1], classes), outputs=2)


@pytest.mark.parametrize(
    ("op_type", "attributes", "error", "message"),
    [
        ("LinearRegressor", {"coefficients": [1.0], "targets": 2}, ModelError, "do not divide"),
        (
            "LinearRegressor",
            {"coefficients": [1.0], "post_transform": "X"},
            UnsupportedOpError,
            "X",
        ),
        ("LinearClassifier", {"coefficients": [1.0]}, ModelError, "no class labels"),
        (
            "LinearClassifier",
            {
                "coefficients": [1.0],
                "intercepts": [0.0],
                "classlabels_ints": [0, 1],
                "post_transform": "PROBIT",
            },
            UnsupportedOpError,
            "one score of two",
        ),
        ("SVMRegressor", {"coefficients": [1.0], "n_supports": 2}, ModelError, "2 supports"),
        (
            "SVMRegressor",
            {"coefficients": [1.0], "rho": [0.0], "kernel_type": "COSINE"},
            UnsupportedOpError,
            "'COSINE' is none of",
        ),
        (
            "SVMClassifier",
            {"classlabels_ints": [0, 1], "vectors_per_class": [1, 1], "coefficients": [1.0]},
            ModelError,
            "do not fit",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(op_type, attributes, error, message) -> None:
    operator = ops.find(DOMAIN, op_type, 1)
    assert operator is not None
    with pytest.raises(error, match=message):
        operator.bind(attributes)


def test_three_axes_are_refused() -> None:
    operator = ops.find(DOMAIN, "LinearRegressor", 1)
    assert operator is not None
    with pytest.raises(InputError, match="neither"):
        operator.function(torch.ones(1, 1, 1), **operator.bind({"coefficients": [1.0]}))


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("LinearRegressor", {"coefficients": numbers(3, 3), "targets": 3}),
        *(
            ("SVMRegressor", kernel | {"coefficients": [0.5, -1.0], "rho": [0.1], "n_supports": 2})
            for kernel in KERNELS
        ),
    ],
)
def test_gradients_of_models_are_finite_differences(op_type, attributes) -> None:
    operator = ops.find(DOMAIN, op_type, 1)
    assert operator is not None
    if op_type == "SVMRegressor":
        attributes = attributes | {"support_vectors": numbers(2, 3)}
    function = partial(operator.function, **operator.bind(attributes))
    x = torch.from_numpy(rows(np.float64)).requires_grad_()
    # The operators compute in float32, which a step of 1e-2 keeps below 1e-4.
    torch.autograd.gradcheck(function, x, eps=1e-2, atol=5e-3, rtol=1e-2)
