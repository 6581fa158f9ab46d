"""Models in QOperator form: operators on codes, with scales in the file or measured at run time."""

from __future__ import annotations

import logging
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from qwrap.graph import subgraphs
from qwrap.ort.borrowed import lender
from qwrap.ort.errors import InvalidModelError
from qwrap.ort.graphs.scopes import node_reads
from qwrap.ort.qoperator import bodies, code_inputs
from qwrap.ort.qoperator.code_values import CodeValues
from qwrap.ort.quant_utils import __producer__, __version__, ms_domain
from qwrap.ort.registry import BUILT_IN_TYPES, CONTRIB_TYPES, CreateOpQuantizer

__all__ = ["ONNXQuantizer"]

__getattr__ = lender(__name__)

logger = logging.getLogger(__name__)


class ONNXQuantizer(CodeValues):
    """Replaces float operators by operators on codes, in one pass over the nodes.

    What the operator classes call is public: they may be a user's own (``registry``).
    """

    # --- the pass over the nodes -----------------------------------------------------------------

    def quantize_model(self) -> ModelProto:
        """Quantize, and return the model.

        Raises:
            InvalidModelError: the graph reads a tensor that nothing makes (a ``RuntimeError``).
        """
        if self.has_QDQ_nodes():
            logger.warning(
                "Please check if the model is already quantized. Note you don't need to quantize "
                "a QAT model. OnnxRuntime support to run QAT model directly."
            )
        for node in list(self.model.nodes()):
            self._quantize_node(node)
        self._dequantize_outputs()
        graph = self.model.graph()
        del graph.node[:]
        graph.node.extend(self.new_nodes)
        self._drop_dequantized_constants()
        if self.parent is None:
            _, missing = self.model.clean_initializers()
            if missing:
                raise InvalidModelError(
                    f"Invalid model with unknown initializers/tensors.{sorted(missing)}"
                )
            if _uses_domain(graph, ms_domain) and not _imports(self.model.model, ms_domain):
                self.model.set_opset_import(ms_domain, 1)
        self.model.model.producer_name = __producer__
        self.model.model.producer_version = __version__
        return self.model.model

    def _quantize_node(self, node: NodeProto) -> None:
        if any(True for _ in subgraphs(node)):
            if self.enable_subgraph_quantization:
                node = self.quantize_node_with_sub_graph(node)
            else:
                for name in sorted(node_reads(node) - set(node.input)):
                    self.read_float(name)
        before = len(self.new_nodes)
        operator = CreateOpQuantizer(self, node)
        operator.quantize()
        for made in self.new_nodes[before:]:
            self.generated_value_names.update(made.output)
        self._note(node, operator, before)

    def _note(self, node: NodeProto, operator: Any, before: int) -> None:
        """Report what became of a node."""
        reason = getattr(operator, "reason", "")
        left = any(made is node for made in self.new_nodes[before:])
        if not reason and (left or self.reason_to_leave(node) is not None):
            reason = self._why_not_asked(node)
        name = node.name or next(iter(node.output), "")
        self.report.add(name, node.op_type, not reason, reason)

    def _why_not_asked(self, node: NodeProto) -> str:
        if node.op_type in ("GRU", "RNN") and not self.static:
            return (
                "onnxruntime has no kernel with measured scales; "
                "quantize_static with QuantFormat.QDQ quantizes its weights"
            )
        reason = self.reason_to_leave(node)
        if reason is None and node.op_type in BUILT_IN_TYPES:
            reason = self._unfit_input(node)
        return reason or "no operator on codes for it"

    def _unfit_input(self, node: NodeProto) -> str:
        """Return why a node of a known type that was asked for is not quantized."""
        if _is_namesake(node):
            return f"an operator of domain '{node.domain}' that is called as another one"
        if node.op_type == "Gather":
            return "its table is not a float constant"
        if node.op_type in ("MatMul", "Gemm") and self.q_matmul_const_b_only:
            return "B is not constant, as extra_options['MatMulConstBOnly'] asks"
        return "its input is not float"

    def should_quantize_node(self, node: NodeProto) -> bool:
        """Whether a node is asked for, and is not another domain's operator of a known name."""
        return not _is_namesake(node) and super().should_quantize_node(node)

    def has_QDQ_nodes(self) -> bool:
        """Whether the model has QuantizeLinear or DequantizeLinear nodes."""
        return any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in self.model.nodes())

    # --- bodies of If, Loop and Scan -------------------------------------------------------------

    def quantize_subgraph(self, subgraph: GraphProto, graph_key: str) -> GraphProto:
        """Return a body, quantized; what it reads of graphs around it is quantized there."""
        return bodies.quantize_body(self, subgraph, graph_key)

    def quantize_node_with_sub_graph(self, node: NodeProto) -> NodeProto:
        """Return the node with its bodies quantized; the node itself if it has none."""
        name = node.name or f"{node.op_type}_node_count_{len(self.new_nodes)}"
        made = NodeProto()
        made.CopyFrom(node)
        for attribute in made.attribute:
            if attribute.type == AttributeProto.GRAPH:
                body = self.quantize_subgraph(attribute.g, f"{name}:{attribute.name}")
                attribute.g.CopyFrom(body)
            for index, graph in enumerate(attribute.graphs):
                body = self.quantize_subgraph(graph, f"{name}:{attribute.name}:{index}")
                graph.CopyFrom(body)
        return made

    # --- floats again ----------------------------------------------------------------------------

    def read_floats(self, node: NodeProto) -> None:
        """Append what a node needs to read its inputs as floats."""
        for name in dict.fromkeys(node.input):
            self.read_float(name)

    def read_float(self, name: str) -> None:
        """Append what makes a tensor float, if it is codes so far."""
        if self.model.get_initializer(name) is not None and name not in self.quantized_value_map:
            self._float_reads.add(name)
        made = self._dequantize_value(name)
        if made is not None:
            self.add_new_nodes([made])

    def _dequantize_value(self, value_name: str) -> NodeProto | None:
        """Return the last node that makes a tensor float; None if it is.

        A tensor of a graph around this one is made float there.
        """
        if value_name in self.generated_value_names:
            return None
        if value_name not in self.quantized_value_map:
            if self.parent is not None and value_name and not self.is_local(value_name):
                self.parent.read_float(value_name)
            return None
        if value_name in self._float_reads or value_name in self._excluded_reads:
            return None  # a constant that stays float
        value = self.quantized_value_map[value_name]
        if value.axis is not None and self.opset_version < 13:
            self._float_reads.add(value_name)  # DequantizeLinear has one scale until then
            return None
        self.generated_value_names.add(value_name)
        half = self.types.is_half(value_name)
        made = self.free_name(f"{value_name}_float32") if half else value_name
        node = helper.make_node(
            "DequantizeLinear",
            [value.q_name, value.scale_name, value.zp_name],
            [made],
            f"{value_name}_DequantizeLinear",
            axis=value.axis,
        )
        if not half:
            return node
        self.add_new_nodes([node])
        return code_inputs.cast_node(made, value_name, TensorProto.FLOAT16)

    def _dequantize_outputs(self) -> None:
        """Append what makes the outputs of the graph float."""
        for output in self.model.graph().output:
            self.read_float(output.name)

    def _drop_dequantized_constants(self) -> None:
        """Remove float constants in whose place a DequantizeLinear node came, in place."""
        found = (self.model.get_initializer(n) for n in self.generated_value_names)
        self.model.remove_initializers([tensor for tensor in found if tensor is not None])


def _is_namesake(node: NodeProto) -> bool:
    """Whether a node is of another domain than the operator of its name that is quantized here."""
    own = (ms_domain,) if node.op_type in CONTRIB_TYPES else ("", "ai.onnx")
    return node.op_type in BUILT_IN_TYPES and node.domain not in own


def _imports(model: ModelProto, domain: str) -> bool:
    return any(opset.domain == domain for opset in model.opset_import)


def _uses_domain(graph: GraphProto, domain: str) -> bool:
    return any(
        node.domain == domain or any(_uses_domain(body, domain) for body in subgraphs(node))
        for node in graph.node
    )
