"""What torch adds to an operator: gradients, other float types, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwrap import ops

OPSET = 19


def function(op_type: str, opset: int = OPSET) -> Callable[..., Any]:
    operator = ops.find("", op_type, opset)
    assert operator is not None
    return operator.function


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


LSTM = [(5, 2, 3), (2, 8, 3), (2, 8, 2), (2, 16)]
CUBIC = {"mode": "cubic", "exclude_outside": 1}
GRADIENTS = [
    ("Conv", [(1, 2, 5, 4), (2, 1, 3, 2), (2,)], [], {"group": 2, "auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", [(1, 2, 3), (2, 1, 3)], [], {"pads": [0, 1], "strides": [2]}),
    (
        "AveragePool",
        [(1, 2, 5, 4)],
        [],
        {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    ("MaxPool", [(1, 2, 5, 4)], [], {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("Resize", [(1, 1, 3, 4)], [None, [1.0, 1.0, 1.7, 0.6]], {"mode": "linear"}),
    ("Resize", [(1, 1, 3, 4)], [None, None, [1, 1, 4, 6]], CUBIC),
    ("LSTM", LSTM, [], {"direction": "bidirectional"}),
    ("LSTM", LSTM, [torch.tensor([5, 3])], {"direction": "bidirectional"}),
    ("Pad", [(2, 4)], [[0, 2, 0, 5]], {"mode": "reflect"}),
    ("CumSum", [(3, 4)], [1], {"exclusive": 1, "reverse": 1}),
    ("PRelu", [(2, 3, 4), (3, 1)], [], {}),
    ("ReduceL2", [(3, 4)], [[1]], {}),
]


# torch warns that no fused kernel takes weights that lie apart in memory; they change every step.
@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
@pytest.mark.parametrize(("op_type", "shapes", "constants", "attributes"), GRADIENTS)
def test_gradients_equal_finite_differences(op_type, shapes, constants, attributes) -> None:
    torch.manual_seed(0)
    compute = function(op_type)

    def of_tensors(*tensors: Tensor) -> Any:
        return compute(*tensors, *constants, **attributes)

    assert torch.autograd.gradcheck(of_tensors, tuple(doubles(*s) for s in shapes), fast_mode=True)


LOW = [
    ("Conv", [(1, 2, 5, 4), (2, 2, 3, 2)], [], {"auto_pad": "SAME_LOWER"}),
    ("AveragePool", [(1, 2, 5, 4)], [], {"kernel_shape": [2, 3], "ceil_mode": 1}),
    ("MaxPool", [(1, 2, 5, 4)], [], {"kernel_shape": [2, 3], "ceil_mode": 1}),
    ("Resize", [(1, 1, 3, 4)], [None, [1.0, 1.0, 1.7, 0.6]], {"mode": "linear"}),
    ("Resize", [(1, 1, 3, 4)], [None, [1.0, 1.0, 2.0, 2.0]], {"mode": "linear"}),
    ("LayerNormalization", [(3, 8), (8,), (8,)], [], {}),
    ("BatchNormalization", [(2, 8, 3), (8,), (8,), (8,)], [torch.ones(8)], {}),
    ("LSTM", LSTM, [], {"direction": "bidirectional"}),
    ("Gemm", [(3, 4), (4, 5), (5,)], [], {"alpha": 0.5}),
    ("HardSwish", [(9,)], [], {}),
    ("PRelu", [(2, 3, 4), (3, 1)], [], {}),
    ("Pow", [(9,)], [2.0], {}),
    ("Clip", [(9,)], [-1.0, torch.tensor(1.0)], {}),
    ("ReduceL2", [(3, 4)], [[1]], {}),
    ("Softmax", [(3, 4)], [], {}),
]


@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("op_type", "shapes", "constants", "attributes"), LOW)
def test_every_float_type_gives_the_float32_result(
    op_type, shapes, constants, attributes, dtype
) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s).to(dtype) for s in shapes]
    converted = [c.to(dtype) if isinstance(c, Tensor) else c for c in constants]
    result = function(op_type)(*tensors, *converted, **attributes)
    wanted = function(op_type)(*(t.float() for t in tensors), *constants, **attributes)
    result, wanted = (r[0] if isinstance(r, tuple) else r for r in (result, wanted))
    assert result.dtype == dtype
    # A handful of roundings to the narrower of the two types.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(result.double(), wanted.double(), rtol=8 * eps, atol=8 * eps)


COMPILED = [
    ("Conv", [torch.randn(4, 3, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("Resize", [None, [1.0, 1.0, 2.0, 2.0]], {}),
    ("Resize", [None, [1.0, 1.0, 1.7, 0.6]], {"mode": "linear"}),
    ("Resize", [None, None, [1, 3, 9, 20]], {"mode": "cubic"}),
    ("Slice", [[-1], [-(2**63)], [-1], [-2]], {}),
    ("Pad", [[0, 0, 1, 1, 0, 0, 1, 1]], {"mode": "reflect"}),
    ("Gather", [torch.tensor([0, -1, 1, 2, 3, 0, 0])], {"axis": 2}),
    ("Gather", [-1], {"axis": 2}),
    ("ReduceMean", [], {"axes": [2, 3], "keepdims": 0}),
    ("Reshape", [[0, -1]], {}),
    ("TopK", [[2]], {}),
    ("Shape", [], {"start": 2}),
]


@pytest.mark.parametrize(("op_type", "constants", "attributes"), COMPILED)
def test_one_graph_serves_all_sizes(op_type, constants, attributes) -> None:
    compute = function(op_type, 13)
    graphs = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    # Written out, because dynamic=True makes a variable of every number that is not in the code.
    names = {f"tensor_{i}": c for i, c in enumerate(constants) if isinstance(c, Tensor)}
    written = [f"tensor_{i}" if isinstance(c, Tensor) else c for i, c in enumerate(constants)]
    arguments = ", ".join(str(c) for c in ["x", *written])
    keywords = ", ".join(f"{name}={value!r}" for name, value in attributes.items())
    call = eval(f"lambda x: compute({arguments}, {keywords})", {"compute": compute, **names})
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for size in ((2, 3, 8, 10), (5, 3, 14, 21)):
        x = torch.randn(size)
        torch.testing.assert_close(
            compiled(x), compute(x, *constants, **attributes), rtol=0, atol=0
        )
    assert len(graphs) == 1
