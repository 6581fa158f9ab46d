"""Writing elements and slices: onnxruntime, the reference evaluator, finite differences."""

import numpy as np
import pytest
import torch

from qwrap import ops

rng = np.random.default_rng(5)


def floats(*shape: int) -> np.ndarray:
    return rng.uniform(-3, 3, shape).astype(np.float32)


DATA = floats(4, 5, 3)
ROWS = np.array([[[0], [3], [1], [2], [4]], [[-1], [0], [-3], [1], [3]]])  # [2, 5, 1] along axis 1
UPDATES = floats(2, 5, 1)
TWICE = np.array([[0, 1, 1, -1, 0]])
POINTS = np.array([[[0, 1], [-1, -2]], [[2, 0], [1, 4]]])
SAME_POINTS = np.array([[0, 1], [-4, 1], [3, 4], [3, -1]])
ONCE = [
    ("Scatter", 9, [DATA, ROWS, UPDATES], {"axis": 1}),
    ("ScatterElements", 11, [DATA, ROWS.astype(np.int32), UPDATES], {"axis": 1}),
    ("ScatterElements", 13, [DATA, ROWS, UPDATES], {"axis": -2}),
    ("ScatterElements", 18, [DATA > 0, ROWS, UPDATES > 0], {"axis": 1}),
    ("ScatterElements", 16, [DATA, ROWS, UPDATES], {"axis": 1, "reduction": "none"}),
    ("ScatterND", 11, [DATA, POINTS, floats(2, 2, 3)], {}),
    ("ScatterND", 13, [DATA, np.array([[1], [-1]]), floats(2, 5, 3)], {}),
    ("ScatterND", 18, [DATA, np.array([[1, 2, 0]]), floats(1)], {}),
]
REDUCED = [
    (name, opset, reduction, inputs)
    for name, inputs in (
        ("ScatterElements", [DATA[0], TWICE.T, floats(5, 1)]),
        ("ScatterND", [DATA, SAME_POINTS, floats(4, 3)]),
    )
    for opset, reduction in ((16, "add"), (16, "mul"), (18, "add"), (18, "max"), (18, "min"))
]


@pytest.mark.parametrize(("op_type", "opset", "inputs", "attributes"), ONCE)
def test_replacing_equals_onnxruntime(check, op_type, opset, inputs, attributes) -> None:
    check(op_type, opset, inputs, attributes)


@pytest.mark.parametrize(("op_type", "opset", "reduction", "inputs"), REDUCED)
def test_reducing_equals_onnxruntime(check, op_type, opset, reduction, inputs) -> None:
    check(op_type, opset, inputs, {"reduction": reduction}, rtol=1e-6)  # orders of two additions


@pytest.mark.parametrize(("op_type", "opset", "reduction", "inputs"), REDUCED)
def test_reducing_integers_equals_onnxruntime(check, op_type, opset, reduction, inputs) -> None:
    data, indices, updates = inputs
    integers = [(4 * data).astype(np.int64), indices, (4 * updates).astype(np.int64)]
    check(op_type, opset, integers, {"reduction": reduction})


@pytest.mark.parametrize(("op_type", "opset", "reduction", "inputs"), REDUCED)
def test_gradients_of_reductions(op_type, opset, reduction, inputs) -> None:
    data, indices, updates = (torch.from_numpy(x) for x in inputs)
    operator = ops.find("", op_type, opset)
    assert operator is not None

    def compute(data: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        return operator.function(data, indices, updates, reduction=reduction)

    leaves = [t.double().requires_grad_() for t in (data, updates)]
    assert torch.autograd.gradcheck(compute, leaves)


@pytest.mark.parametrize("index", range(len(ONCE)))
def test_gradients_of_replacement(index: int) -> None:
    op_type, opset, (data, indices, updates), attributes = ONCE[index]
    operator = ops.find("", op_type, opset)
    assert operator is not None
    places = torch.from_numpy(indices)

    def compute(data: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
        return operator.function(data, places, updates, **attributes)

    leaves = [torch.from_numpy(t).double().requires_grad_() for t in (data, updates)]
    assert torch.autograd.gradcheck(compute, leaves)


CACHE, NEW = floats(2, 3, 8, 4), floats(2, 3, 3, 4)
STARTS = np.array([1, 5])


def test_tensor_scatter_equals_the_reference(check) -> None:
    check("TensorScatter", 24, [CACHE, NEW], {})
    check("TensorScatter", 24, [CACHE, NEW, STARTS], {})
    check("TensorScatter", 24, [CACHE, NEW, STARTS + 2], {"mode": "circular"})
    swapped = [CACHE.swapaxes(1, 2).copy(), NEW.swapaxes(1, 2).copy(), STARTS]
    check("TensorScatter", 24, swapped, {"axis": 1})


def test_tensor_scatter_moves_eight_bit_floats() -> None:
    operator = ops.find("", "TensorScatter", 24)
    assert operator is not None
    cache, new = (torch.from_numpy(x).to(torch.float8_e4m3fn) for x in (CACHE, NEW))
    starts = torch.from_numpy(STARTS)
    wanted = operator.function(cache.float(), new.float(), starts)
    assert torch.equal(operator.function(cache, new, starts).float(), wanted)
