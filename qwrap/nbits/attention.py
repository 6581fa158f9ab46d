"""Which weights make the queries and keys of attention."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.graph.nodes import STANDARD

MOVES = frozenset({
    "Add", "Cast", "Concat", "Div", "Expand", "Identity", "Mul", "Neg", "Reshape", "Slice", "Split",
    "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip
"""What lies between a projection and the product of queries and keys: heads, rotation, a cache."""
WEIGHS = frozenset({"Add", "Cast", "Div", "Mul", "Sub", "Where"})
"""What lies between that product and its Softmax: a scale and masks."""
OPERATORS = frozenset({
    "Attention", "GroupQueryAttention", "MultiHeadAttention", "DecoderMaskedMultiHeadAttention",
})  # fmt: skip
FARTHEST = 64  # nodes looked at behind a projection


def makes_scores(constants: Constants, node: ir.Node) -> bool:
    """Whether what a node makes is compared with others by attention: it is a query or key.

    That is so if all it does on the way is to move, be scaled or be rotated, into a product of two
    tensors that a Softmax reads, or into one of the first two inputs of an attention operator.
    """
    waiting, seen = list(node.outputs), set[ir.Node]()
    while waiting and len(seen) < FARTHEST:
        value = waiting.pop()
        for use in value.uses():
            reader = use.node
            if reader.op_type in OPERATORS:
                if use.idx < 2:
                    return True
            elif reader.op_type == "MatMul" and reader.domain in STANDARD:
                if _is_compared(constants, reader):
                    return True
            elif reader.op_type in MOVES and reader not in seen:
                seen.add(reader)
                waiting.extend(reader.outputs)
    return False


def _is_compared(constants: Constants, product: ir.Node) -> bool:
    if any(constants.tensor(value) is not None for value in product.inputs):
        return False
    return any(reader.op_type == "Softmax" for reader in _behind(product))


def _behind(node: ir.Node) -> Iterator[ir.Node]:
    waiting, seen = list(node.outputs), set[ir.Node]()
    while waiting and len(seen) < FARTHEST:
        for use in waiting.pop().uses():
            if use.node not in seen:
                seen.add(use.node)
                yield use.node
                if use.node.op_type in WEIGHS:
                    waiting.extend(use.node.outputs)
