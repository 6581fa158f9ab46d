"""TfIdfVectorizer against onnxruntime."""

from typing import Any

import numpy as np
import pytest

from qwrap import ops
from qwrap.errors import InputError, ModelError, UnsupportedOpError

POOL = {
    "ngram_counts": [0, 4, 10],
    "ngram_indexes": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "pool_int64s": [2, 3, 5, 4, 5, 6, 7, 8, 6, 7, 2, 3, 5, 5, 6, 7],
    "mode": "TF",
    "min_gram_length": 1,
    "max_gram_length": 3,
    "max_skip_count": 0,
}
rng = np.random.default_rng(7)


def rows(dtype: type, *shape: int) -> np.ndarray:
    return rng.integers(1, 9, shape).astype(dtype)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (1, 3)])
@pytest.mark.parametrize("skip", [0, 1, 5])
def test_counts_of_integers_equal_onnxruntime(check, lengths, skip) -> None:
    attributes = POOL | {
        "min_gram_length": lengths[0],
        "max_gram_length": lengths[1],
        "max_skip_count": skip,
    }
    check("TfIdfVectorizer", 9, [rows(np.int64, 30)], attributes)
    check("TfIdfVectorizer", 9, [rows(np.int32, 4, 40)], attributes)
    check("TfIdfVectorizer", 9, [rows(np.int64, 1)], attributes)


@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 3.0, 1.5, 0.1, 7.0, 0.25, 4.0, 9.0]])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 1, 8, 0, 4, 2, 5, 7, 6]])
def test_weights_and_order_equal_onnxruntime(check, mode, weights, order) -> None:
    attributes: dict[str, Any] = POOL | {"mode": mode, "ngram_indexes": order}
    attributes |= {} if weights is None else {"weights": weights}
    # onnxruntime adds a weight as often as its n-gram occurs, which rounds each time.
    check("TfIdfVectorizer", 9, [rows(np.int64, 3, 30)], attributes, rtol=1e-6)


@pytest.mark.parametrize("change", [{}, {"mode": "IDF"}, {"mode": "TFIDF", "weights": [1.0] * 9}])
def test_n_grams_may_share_a_column(check, change) -> None:
    attributes = POOL | {"ngram_indexes": [0, 1, 0, 1, 3, 3, 3, 0, 5]} | change
    check("TfIdfVectorizer", 9, [rows(np.int64, 3, 30)], attributes)


def test_counts_of_text_equal_onnxruntime(check) -> None:
    attributes = {k: v for k, v in POOL.items() if k != "pool_int64s"}
    attributes |= {"pool_strings": [str(n) for n in POOL["pool_int64s"]], "max_skip_count": 2}
    check("TfIdfVectorizer", 9, [rows(np.int64, 2, 30).astype(str).astype(object)], attributes)


def test_a_row_without_tokens_counts_nothing(check) -> None:
    check("TfIdfVectorizer", 9, [np.zeros((2, 0), np.int64)], POOL)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "BM25"}, UnsupportedOpError, "mode='BM25'"),
        ({"max_gram_length": 4}, ModelError, "do not fit"),
        ({"ngram_counts": [0, 3, 10]}, ModelError, "no whole 2-grams"),
        ({"pool_int64s": [2, 2, *POOL["pool_int64s"][2:]]}, ModelError, "twice"),
        (
            {"ngram_indexes": [0] * 9, "weights": [2.0] * 9, "mode": "IDF"},
            UnsupportedOpError,
            "share an index",
        ),
        ({"ngram_indexes": [0, 1]}, ModelError, "9 n-grams, 2 indices"),
    ],
)
def test_pools_that_do_not_fit_are_refused(change, error, message) -> None:
    operator = ops.find("", "TfIdfVectorizer", 9)
    assert operator is not None
    with pytest.raises(error, match=message):
        operator.bind(POOL | change)


def test_three_axes_are_refused() -> None:
    operator = ops.find("", "TfIdfVectorizer", 9)
    assert operator is not None
    with pytest.raises(InputError, match="neither"):
        operator.function(rows(np.int64, 2, 2, 2).astype(object), **operator.bind(POOL))
