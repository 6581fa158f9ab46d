"""The facts about operators agree with what the operators compute."""

import numpy as np
import onnx
import pytest
import torch

from qwrap import ops
from qwrap.ops.traits import PASS_THROUGH, WEIGHTED

X = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(0))
ZEROS = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
OPSET = 13
# Operator -> further inputs and attributes of one example.
EXAMPLES = {
    "Concat": ([X], {"axis": 1}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "Expand": ([[2, 4, 4, 6]], {}),
    "Gather": ([torch.tensor([2, 0])], {"axis": 2}),
    "GatherElements": ([ZEROS], {"axis": 2}),
    "GatherND": ([ZEROS], {}),
    "MaxPool": ([], {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}),
    "Pad": ([[0, 0, 1, 1, 0, 0, 1, 1]], {}),
    "Reshape": ([[-1]], {}),
    "Resize": ([None, [1.0, 1.0, 1.5, 2.0]], {}),
    "Slice": ([[1], [3], [2]], {}),
    "SpaceToDepth": ([], {"blocksize": 2}),
    "Split": ([[1, 3]], {"axis": 1}),
    "Tile": ([[1, 1, 2, 1]], {}),
    "TopK": ([[2]], {}),
    "Unsqueeze": ([[0]], {}),
}


@pytest.mark.parametrize("op_type", sorted(set(PASS_THROUGH) - {"Upsample"}))
def test_what_passes_through_holds_only_input_values(op_type: str) -> None:
    inputs, attributes = EXAMPLES.get(op_type, ([], {}))
    operator = ops.find("", op_type, OPSET)
    assert operator is not None
    result = operator.function(X, *inputs, **attributes)
    values = set((result[0] if isinstance(result, tuple) else result).flatten().tolist())
    allowed = set(X.flatten().tolist()) | ({0.0} if PASS_THROUGH[op_type].adds_zero else set())
    assert values <= allowed


def test_interpolation_and_nonzero_padding_do_not_pass_through() -> None:
    assert PASS_THROUGH["Resize"].holds({})
    assert PASS_THROUGH["Upsample"].holds({"mode": "nearest"})
    assert not PASS_THROUGH["Resize"].holds({"mode": "linear"})
    assert PASS_THROUGH["Pad"].holds({"mode": "reflect", "value": 0.0})
    assert not PASS_THROUGH["Pad"].holds({"value": 1.0})


def test_weight_and_bias_are_the_inputs_that_the_schema_calls_so() -> None:
    for op_type, weighted in WEIGHTED.items():
        names = [i.name for i in onnx.defs.get_schema(op_type, OPSET).inputs]
        assert names[weighted.weight] in ("W", "B")
        assert weighted.bias is None or names[weighted.bias] in ("B", "C")


WEIGHTS = {
    "Conv": (X, (5, 4, 3, 3), {}),
    "ConvTranspose": (X, (4, 5, 3, 3), {}),
    "Gemm": (X[0, 0], (6, 5), {}),
    "MatMul": (X, (6, 5), {}),
}


@pytest.mark.parametrize("op_type", WEIGHTED)
def test_a_weight_channel_reaches_one_output_channel(op_type: str) -> None:
    x, shape, attributes = WEIGHTS[op_type]
    axis = WEIGHTED[op_type].axis(attributes)
    weight = torch.zeros(shape)
    weight.select(axis, 2).fill_(1.0)
    operator = ops.find("", op_type, OPSET)
    assert operator is not None
    y = operator.function(x, weight, **attributes)
    channels = y.movedim(1 if "Conv" in op_type else -1, 0).flatten(1).abs().sum(1)
    assert np.flatnonzero(channels.numpy()).tolist() == [2]


def test_a_transposed_gemm_weight_has_its_channels_first() -> None:
    assert WEIGHTED["Gemm"].axis({"transB": 1}) == 0
    assert WEIGHTED["Gemm"].axis({"transB": 0}) == 1
