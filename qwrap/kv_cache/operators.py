"""GroupQueryAttention on codes: onnxruntime's operator reads and writes them itself.

onnxruntime 1.31.1 runs it on CPUs for symmetric codes, int8 or two of 4 bits in a byte, per tensor
or per channel of each head, but not the one for keys and the other for values: one scale is
written as many equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qwrap.graph.constants import Constants
from qwrap.kv_cache.codes import Code
from qwrap.kv_cache.detect import MICROSOFT, Pair
from qwrap.kv_cache.route import asks_shape
from qwrap.kv_cache.way import Way

GROUPED = "GroupQueryAttention"
_PAST, _SCALE, _INPUTS = (3, 4), (12, 13), 14
_KINDS = ("k_quant_type", "v_quant_type")
_BIT_WIDTH = "kv_cache_bit_width"


def reads_codes(pair: Pair, pairs: Sequence[Pair]) -> bool:
    """Whether an operator can read and write symmetric signed codes of a cache.

    Keys and values have one type there, so that both have to be among ``pairs``.
    """
    node = pair.operator
    if node is None or (node.domain, node.op_type) != (MICROSOFT, GROUPED):
        return False
    pasts = [node.inputs[index] for index in _PAST]
    known = {each.past for each in pairs if each.operator is node}
    alone = all(value is not None and _is_read_there(value, node) for value in pasts)
    return alone and set(pasts) <= known


def _is_read_there(value: ir.Value, node: ir.Node) -> bool:
    return all(user is node or asks_shape(user) for user, _ in value.uses())


def give_codes(way: Way, code: Code, model: ir.Model, constants: Constants) -> None:
    """Let the operator of a cache read and write its codes, in place."""
    node, past = way.pair.operator, way.pair.past
    assert node is not None
    assert past is not None
    which = _PAST.index(list(node.inputs).index(past))
    scale = code.of_channels()
    name = constants.unique_name(f"{past.name}_scale")
    node.resize_inputs(max(_INPUTS, len(node.inputs)))
    node.replace_input_with(_SCALE[which], constants.add(model.graph, name, np.asarray(scale)))
    node.attributes.add(ir.AttrString(_KINDS[which], "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64(_BIT_WIDTH, code.dtype.bits))
