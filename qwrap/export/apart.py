"""Which operators onnxruntime must not find right behind a DequantizeLinear."""

from __future__ import annotations

import onnx_ir as ir

from qwrap.config import QuantSpec
from qwrap.dtypes import INT8
from qwrap.graph.index import OnnxGraph
from qwrap.ops.traits import WEIGHTED
from qwrap.quant.placement.weights_only import is_product
from qwrap.quant.plan import QuantPlan

# What onnxruntime moves pairs past, and the operators whose float weights it quantizes by itself.
PASSED = frozenset({
    "Flatten",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
})
REQUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm"})
JOINED = PASSED | {"Relu", "Clip", "Identity"}  # what it moves pairs past, or merges
OUTPUT_DTYPE = 21  # opset from which a QuantizeLinear may name its type
FEW_BITS, EIGHT_BITS = 4, 8


class Apart:
    """Judges the readers of codes in one draft.

    Measured with onnxruntime 1.31; its optimiser does the following without looking further.

    - A float weight of Conv, ConvTranspose or Gemm between pairs it makes int8, asked or not; and a
      float bias int32, at the product of two scales, with which large ones of 16 bits overflow.
    - For Conv with input and output of 4 bits and a weight of 8, and for MaxPool of uint4, it makes
      integer kernels that do not take them, and refuses the file.
    - It moves pairs past operators that only move values. From opset 21 on it names the type of the
      new ones, int8, and then makes uint8 of the zero point: it refuses what it made. And where a
      body reads what was moved, it writes beyond the node's inputs, which ends the process.
    - An Identity it removes, and then one of two pairs; where a body reads the codes, this too ends
      the process.
    - Where it moves pairs to the front of such operators, and what these read is a graph output,
      the caller gets that rounded.
    - It makes a MatMulNBits of a product with a weight that it looks for in the body alone where
      there is one, although it is outside: it refuses the file.

    The first is no concern of other runtimes, which would not see a layer behind its pair.

    Attributes:
        is_cpu: whether the file is for onnxruntime on CPUs.
    """

    def __init__(self, plan: QuantPlan, graph: OnnxGraph, *, is_cpu: bool = True) -> None:
        self.plan, self.graph, self.is_cpu = plan, graph, is_cpu
        self._quantized = {graph.values[key] for key in plan.tensors}

    def in_front_of(self, node: ir.Node, spec: QuantSpec) -> bool:
        """Whether ``node``, which reads codes of ``spec``, has to stand apart from the pair."""
        if node.domain or not spec.dtype.is_integer:
            return False
        if self.graph.node_key(node) in self.plan.half:  # casts stand between
            return False
        if self._is_requantized(node):
            return self.is_cpu
        if spec.dtype.bits == FEW_BITS and self._lacks_kernel(node):
            return True
        if not self._is_passed(node):
            return False
        return self._is_renamed(spec) or self._leads_astray(node)

    def behind(self, node: ir.Node, spec: QuantSpec) -> bool:
        """Whether ``node``, whose output becomes codes of ``spec``, has to stand apart."""
        if node.domain:
            return False
        if spec.dtype.bits == FEW_BITS and node.op_type == "MaxPool":
            return True  # else the pair is moved to its front, and makes an integer kernel there
        if node.op_type == "Identity":
            return any(use.node.graph is not node.graph for use in node.outputs[0].uses())
        return self._is_passed(node) and (self._is_renamed(spec) or _is_of_output(node))

    def of_weight(self, node: ir.Node, spec: QuantSpec) -> bool:
        """Whether ``node`` has to stand apart from the pair of its weight, codes of ``spec``."""
        if not is_product(node) or node.graph is self.graph.model.graph:
            return False
        alone = self.plan.nodes[self.graph.node_key(node)].role == "weights"
        return alone or spec.dtype.bits <= FEW_BITS

    def _is_renamed(self, spec: QuantSpec) -> bool:
        return spec.dtype.onnx_type == INT8.onnx_type and self.graph.opset >= OUTPUT_DTYPE

    def _has_float_constant(self, node: ir.Node) -> bool:
        """Whether weight or bias are constants that are not written as codes."""
        key, known = self.graph.node_key(node), WEIGHTED[node.op_type]
        planned = {*self.plan.constants, *self.plan.biases}
        left = [i for i in (known.weight, known.bias) if (key, i) not in planned]
        return any(v is not None and _is_constant(v) for v in (_input(node, i) for i in left))

    def _is_requantized(self, node: ir.Node) -> bool:
        if node.op_type not in REQUANTIZED or not self._has_float_constant(node):
            return False
        return self._is_rounded(node.outputs[0])

    def _is_rounded(self, value: ir.Value) -> bool:
        """Whether a pair is behind a value, or behind what it can be moved past or merged with."""
        if value in self._quantized:
            return True
        behind = [user for user in value.consumers() if user.op_type in JOINED]
        return any(self._is_rounded(user.outputs[0]) for user in behind)

    def _lacks_kernel(self, node: ir.Node) -> bool:
        if node.op_type != "Conv":
            return node.op_type == "MaxPool"
        weight = self.plan.constants.get((self.graph.node_key(node), 1))
        return weight is not None and weight.spec.dtype.bits > FEW_BITS

    def _is_passed(self, node: ir.Node) -> bool:
        moves = self.plan.nodes[self.graph.node_key(node)].role == "moves"
        return node.op_type in PASSED and not moves

    def _leads_astray(self, node: ir.Node) -> bool:
        """Whether a pair that is moved past ``node`` comes to what must not have one in front."""
        if node.outputs[0] in self._quantized:
            return False
        users = [use.node for use in node.outputs[0].uses()]
        return any(
            user.graph is not node.graph
            or self._is_requantized(user)
            or (user.op_type in PASSED and self._leads_astray(user))
            for user in users
        )


def _is_of_output(node: ir.Node) -> bool:
    """Whether ``node`` moves values of a graph output, perhaps moved by others before."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    if value is None or producer is None:
        return False
    return value.is_graph_output() or (producer.op_type in PASSED and _is_of_output(producer))


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return None if index is None or index >= len(node.inputs) else node.inputs[index]


def _is_constant(value: ir.Value) -> bool:
    return ir.convenience.get_const_tensor(value) is not None
