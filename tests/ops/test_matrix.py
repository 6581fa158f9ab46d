"""Operators on matrices against onnxruntime, the reference evaluator and finite differences."""

import numpy as np
import pytest
import torch

rng = np.random.default_rng(8)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-3, 3, shape).astype(np.float32)


X = floats(2, 4, 6)
EXACT = [
    ("Trilu", 14, [X], {}),
    ("Trilu", 14, [X], {"upper": 0}),
    *(("Trilu", 14, [X, np.array(k)], {"upper": u}) for k in (-9, -2, 1, 9) for u in (0, 1)),
    ("Trilu", 14, [X > 0, np.array([-1])], {}),
    ("Trilu", 14, [np.zeros((3, 0), np.int64)], {}),
    ("EyeLike", 9, [X[0]], {}),
    ("EyeLike", 22, [X[0]], {"k": 2, "dtype": 6}),
    ("EyeLike", 9, [X[0].astype(np.int64)], {"k": -3}),
    ("EyeLike", 9, [X[0].astype(np.int32)], {"k": 9, "dtype": 11}),
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), EXACT)
def test_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes)


@pytest.mark.parametrize("opset", [11, 22])
def test_det(check, check_gradients, opset: int) -> None:
    x = floats(3, 2, 4, 4)
    check("Det", opset, [x], {}, rtol=1e-5, atol=1e-4)  # products of four, which cancel
    check("Det", opset, [x[0, 0]], {}, rtol=1e-5, atol=1e-4)
    check_gradients("Det", opset, [torch.from_numpy(x)])


EQUATIONS = [
    ("ij,jk", [(3, 4), (4, 5)]),
    ("ij,jk->ki", [(3, 4), (4, 5)]),
    ("i j , j k -> i k", [(3, 4), (4, 5)]),
    ("...ij,...jk->...ik", [(2, 1, 3, 4), (5, 4, 2)]),
    ("...ij,...jk", [(2, 3, 4), (2, 4, 2)]),
    ("b...", [(2, 3, 4)]),
    ("...b->b...", [(2, 3, 4)]),
    ("ba", [(2, 3)]),
    ("aB", [(2, 3)]),
    ("zA,Az", [(2, 3), (3, 2)]),
    ("zA,Ab", [(2, 3), (3, 4)]),
    ("ii", [(4, 4)]),
    ("ii->i", [(4, 4)]),
    ("...ii->...i", [(2, 3, 3)]),
    ("iji,j->ij", [(3, 2, 3), (2,)]),
    ("ij->", [(3, 4)]),
    ("i,j,k->kij", [(2,), (3,), (4,)]),
    ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    (",i->i", [(), (3,)]),
    ("->", [()]),
    ("ij,ij", [(3, 1), (1, 4)]),
]


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS)
def test_einsum_equals_numpy(equation, shapes) -> None:
    from qwrap.ops.matrix import einsum

    tensors = [torch.from_numpy(floats(*s)).double() for s in shapes]
    integers = [(4 * t).long() for t in tensors]
    wanted = np.einsum(equation, *(t.numpy() for t in tensors))
    # Sums of at most 12 products in another order.
    np.testing.assert_allclose(einsum(*tensors, equation=equation), wanted, rtol=1e-12, atol=1e-12)
    exact = np.einsum(equation, *(t.numpy() for t in integers))
    np.testing.assert_array_equal(einsum(*integers, equation=equation), exact)


def test_einsum_equals_onnxruntime(check, check_gradients) -> None:
    inputs = [floats(2, 3, 4), floats(2, 4, 5)]
    for opset in (12, 28):
        check("Einsum", opset, inputs, {"equation": "bij,bjk->bik"}, rtol=1e-5, atol=1e-5)
    tensors = [torch.from_numpy(x) for x in inputs]
    check_gradients("Einsum", 12, tensors, equation="...ij,...jk->k")
