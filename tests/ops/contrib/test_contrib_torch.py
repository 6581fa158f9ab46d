"""What torch adds to operators of com.microsoft: gradients and compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwrap import ops


def function(op_type: str) -> Callable[..., Any]:
    operator = ops.find("com.microsoft", op_type, 1)
    assert operator is not None
    return operator.function


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


LENGTHS = torch.tensor([4, 2], dtype=torch.int32)
BYTES = torch.randint(0, 256, (6, 2, 8), dtype=torch.uint8)
GRADIENTS = [
    ("BiasGelu", [(3, 4), (4,)], [], {}),
    ("FastGelu", [(3, 4), (4,)], [], {}),
    ("QuickGelu", [(3, 4)], [], {}),
    ("BiasSplitGelu", [(2, 3, 4), (4,)], [], {}),
    ("SkipLayerNormalization", [(2, 3, 8), (2, 3, 8), (8,), (8,), (8,)], [], {"output_count": 4}),
    ("SkipSimplifiedLayerNormalization", [(2, 3, 8), (2, 3, 8), (8,)], [], {}),
    ("GroupNorm", [(2, 3, 3, 4), (4,), (4,)], [], {"groups": 2, "activation": 1}),
    ("FusedMatMul", [(3, 2, 4), (5, 4)], [], {"transBatchA": 1, "transB": 1, "alpha": 0.5}),
    ("FusedGemm", [(3, 4), (4, 5), (5,)], [], {"activation": "Tanh", "beta": 0.5}),
    ("FusedConv", [(1, 2, 5, 4), (2, 2, 3, 3), (2,), (1, 2, 3, 2)], [], {"activation": "Tanh"}),
    ("Attention", [(2, 3, 8), (8, 24), (24,)], [LENGTHS], {"num_heads": 2, "unidirectional": 1}),
    ("MultiHeadAttention", [(2, 3, 8), (2, 4, 8), (2, 4, 8), (24,)], [], {"num_heads": 2}),
    (
        "GroupQueryAttention",
        [(2, 1, 16), (2, 1, 8), (2, 1, 8), (2, 2, 6, 4), (2, 2, 6, 4)],
        [LENGTHS, 5],
        {"num_heads": 4, "kv_num_heads": 2, "softcap": 2.0, "smooth_softmax": 1},
    ),
    (
        "GatedRelativePositionBias",
        [(2, 3, 8), (8,), (1, 2, 3, 3), (4, 6), (6,), (1, 2, 1, 1)],
        [],
        {"num_heads": 2},
    ),
    (
        "MatMulNBits",
        [(3, 32)],
        [BYTES, torch.ones(6, 2, dtype=torch.float64)],
        {"K": 32, "N": 6, "block_size": 16},
    ),
    (
        "MoE",
        [(3, 4), (3, 3), (3, 5, 4), (3, 5), (3, 4, 5)],
        [],
        {"k": 2, "activation_type": "silu"},
    ),
]


@pytest.mark.parametrize(("op_type", "shapes", "constants", "attributes"), GRADIENTS)
def test_gradients_equal_finite_differences(op_type, shapes, constants, attributes) -> None:
    torch.manual_seed(0)
    compute = function(op_type)

    def of_tensors(*tensors: Tensor) -> Any:
        return compute(*tensors, *constants, **attributes)

    assert torch.autograd.gradcheck(of_tensors, tuple(doubles(*s) for s in shapes), fast_mode=True)


@pytest.mark.parametrize(("op_type", "shapes", "constants", "attributes"), GRADIENTS)
def test_every_operator_compiles_into_one_graph(op_type, shapes, constants, attributes) -> None:
    torch.manual_seed(0)
    compute = function(op_type)
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]

    def of_tensors(*tensors: Tensor) -> Any:
        return compute(*tensors, *constants, **attributes)

    torch._dynamo.reset()
    compiled = torch.compile(of_tensors, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), of_tensors(*tensors), rtol=0, atol=0)
