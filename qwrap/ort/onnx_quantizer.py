"""Models in QOperator form: operators on codes, with scales in the file or measured at run time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from qwrap.graph import subgraphs
from qwrap.ort import activation_params, bodies, code_inputs, integer_bias, measured_ranges
from qwrap.ort.base_quantizer import BaseQuantizer
from qwrap.ort.enums import QuantizationMode, QuantizedValueType
from qwrap.ort.errors import InvalidModelError, QuantizationError
from qwrap.ort.onnx_model import ONNXModel
from qwrap.ort.quant_utils import (
    QuantizedValue,
    __producer__,
    __version__,
    ms_domain,
    save_and_reload_model_with_shape_infer,
)
from qwrap.ort.registry import CreateOpQuantizer
from qwrap.ort.scopes import made_names, node_reads
from qwrap.ort.tensor_types import TensorTypes

__all__ = ["ONNXQuantizer"]

Inputs = tuple[Any, Any, Any, Any]
"""Names of codes, zero points and scales of inputs, and nodes that make them; Nones if none can."""

logger = logging.getLogger(__name__)


class ONNXQuantizer(BaseQuantizer):
    """Replaces float operators by operators on codes, one pass over the nodes.

    What the operator classes call is public: they may be a user's own (``registry``).

    Attributes:
        mode: scales from ``tensors_range`` (QLinearOps), or measured at run time (IntegerOps).
        static: whether activations have scales in the file.
        parent: the quantizer of the graph around this one, None for the main graph.
        new_nodes: the nodes of the quantized graph so far.
        quantized_value_map: float tensor -> its codes.
        generated_value_names: float tensors that the quantized graph has so far.
    """

    parent: ONNXQuantizer | None

    def __init__(
        self,
        model: ModelProto,
        per_channel: bool,
        reduce_range: bool,
        mode: QuantizationMode,
        static: bool,
        weight_qType: Any,
        activation_qType: Any,
        tensors_range: Any,
        nodes_to_quantize: Sequence[str] | None,
        nodes_to_exclude: Sequence[str] | None,
        op_types_to_quantize: Sequence[str],
        extra_options: dict[str, Any] | None = None,
        *,
        parent: ONNXQuantizer | None = None,
    ) -> None:
        """Take a model and say how to quantize it; ``quantize_model`` does it.

        Args:
            model: its main graph; only a copy is changed.
            per_channel: one scale per output channel of a weight.
            reduce_range: weights of 7 bits.
            mode: which operators to make.
            static: whether scales of activations come from ``tensors_range``.
            weight_qType: a ``QuantType`` or its ``TensorProto`` number.
            activation_qType: likewise.
            tensors_range: ``TensorsData``, None for dynamic quantization.
            nodes_to_quantize: names, none for all.
            nodes_to_exclude: names.
            op_types_to_quantize: operators.
            extra_options: see ``qwrap.ort.options``.
            parent: quantizer of the graph around ``model``'s, if that is the body of a node.

        Raises:
            QuantizationError: a type or an override that this form does not have.
        """
        BaseQuantizer.__init__(
            self,
            model,
            per_channel,
            reduce_range,
            weight_qType,
            activation_qType,
            tensors_range,
            nodes_to_quantize,
            nodes_to_exclude,
            op_types_to_quantize,
            extra_options,
        )
        self.parent = parent
        if mode not in QuantizationMode:
            raise QuantizationError(f"unsupported quantization mode {mode}")
        self.mode = mode
        self.static = static
        self._check_code_types()
        if not static and parent is None:
            self._split_gemms()
        self.fuse_dynamic_quant = self.opset_version > 10
        self.q_matmul_const_b_only = bool(self.extra_options.get("MatMulConstBOnly"))
        self.graph_scope = "/"
        self.new_nodes: list[NodeProto] = []
        self.quantized_value_map: dict[str, QuantizedValue] = {}
        self.generated_value_names: set[str] = self.model.get_non_initializer_inputs()
        graph = self.model.graph()
        self.tensor_names = dict.fromkeys(
            (*(v.name for v in graph.output), *(v.name for v in graph.input)), 1
        )
        self.tensor_names.update((name, 1) for node in graph.node for name in node.output)
        self.quantization_params = self.calculate_quantization_params()
        self.fixed_qrange_uint8_name = "fixed_quantization_range_uint8"
        self.fixed_qrange_int8_name = "fixed_quantization_range_int8"
        self.fixed_zero_name = "fixed_zero"
        self.fixed_zero_zp_name = "fixed_zero_zp"
        self.types = TensorTypes(self)
        self.biased_weights: set[str] = set()  # codes whose scale a bias was computed with
        self._taken = made_names(graph)
        self._float_reads: set[str] = set()  # constants that a node reads as floats
        self._param_names: dict[str, tuple[str, str]] = {}
        self._excluded_reads = self._reads_of_excluded_nodes()

    def _check_code_types(self) -> None:
        """Refuse types that no operator of this form takes, before any work."""
        integers = {TensorProto.INT8, TensorProto.UINT8}
        known = integers | ({TensorProto.FLOAT8E4M3FN} if self.static else set())
        form = "the QOperator form" if self.static else "dynamic quantization"
        overrides = {getattr(t, "tensor_type", t) for t in self.tensor_quant_override_qtypes}
        for what, kinds in (
            ("weights", {self.weight_qType}),
            ("activations", {self.activation_qType}),
            ("TensorQuantOverrides", overrides),
        ):
            for kind in kinds - known:
                name = helper.tensor_dtype_to_string(kind).removeprefix("TensorProto.")
                raise QuantizationError(
                    f"{what} cannot be {name} in {form}, which has 8-bit types only; use "
                    "QuantFormat.QDQ with quantize_static, or MatMulNBitsQuantizer for weights"
                )

    def _split_gemms(self) -> None:
        """Make MatMul and Add of Gemm nodes, which have no form with measured scales."""
        if not any(_has_gemm(node) for node in self.model.nodes()):
            return
        self.model.replace_gemm_with_matmul()
        model = save_and_reload_model_with_shape_infer(self.model.model)
        graph = model.graph
        self.value_infos = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
        self.model = ONNXModel(model)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

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
        if left and not reason:
            reason = self._why_not_asked(node)
        name = node.name or next(iter(node.output), "")
        self.report.add(name, node.op_type, not reason, reason)

    def _why_not_asked(self, node: NodeProto) -> str:
        if self.nodes_to_exclude and node.name in self.nodes_to_exclude:
            return "excluded by name"
        if self.nodes_to_quantize and node.name not in self.nodes_to_quantize:
            return "not among nodes_to_quantize"
        if node.op_type in ("GRU", "RNN") and not self.static:
            return (
                "onnxruntime has no kernel with measured scales; "
                "quantize_static with QuantFormat.QDQ quantizes its weights"
            )
        if node.op_type not in self.op_types_to_quantize:
            return "operator type not asked for"
        return "no operator on codes for it"

    def has_QDQ_nodes(self) -> bool:
        """Whether the model has QuantizeLinear or DequantizeLinear nodes."""
        return any(n.op_type in ("QuantizeLinear", "DequantizeLinear") for n in self.model.nodes())

    def add_new_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Append nodes to the quantized graph."""
        for node in nodes:
            self.new_nodes.append(node)
            self.generated_value_names.update(node.output)

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

    def find_initializer_in_path(self, initializer_name: str) -> bool:
        """Whether this graph or one around it has that initializer."""
        return self.find_owner(initializer_name) is not None

    def find_owner(self, initializer_name: str) -> ONNXQuantizer | None:
        """Return the quantizer of the innermost graph that has that initializer."""
        if self.model.get_initializer(initializer_name) is not None:
            return self
        if self.parent is None or self.is_local(initializer_name):
            return None
        return self.parent.find_owner(initializer_name)

    def find_initializer(self, name: str) -> TensorProto | None:
        """Return an initializer of this graph or of one around it."""
        owner = self.find_owner(name)
        return None if owner is None else owner.model.get_initializer(name)

    def is_local(self, name: str) -> bool:
        """Whether this graph itself makes a tensor."""
        return name in self.tensor_names or self.model.get_initializer(name) is not None

    # --- types -----------------------------------------------------------------------------------

    def get_tensor_type(self, tensor_name: str, mandatory: bool = False) -> int | None:
        """Return a tensor's ``TensorProto.DataType``.

        Raises:
            InvalidModelError: it is ``mandatory`` and neither known nor given by
                ``extra_options['DefaultTensorType']`` (a ``RuntimeError``).
        """
        return self.types.find(tensor_name, mandatory)

    def is_float_tensor(self, tensor_name: str) -> bool:
        """Whether a tensor is of float32 or float16."""
        return self.types.is_float(tensor_name)

    def is_valid_quantize_weight(self, weight_name: str) -> bool:
        """Whether a tensor is a float constant of this graph, or of one around it."""
        tensor = self.find_initializer(weight_name)
        return tensor is not None and tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)

    def is_input_a_initializer(self, input_name: str) -> bool:
        """Whether a tensor is a constant of this graph, or of one around it."""
        return self.find_initializer(input_name) is not None

    def code_type(self, name: str, as_weight: bool = False) -> int | None:
        """Return the type that a tensor's codes have or would get, None if it cannot have any."""
        return code_inputs.code_type(self, name, as_weight)

    def output_type(self, name: str) -> int | None:
        """Return the type of codes of an output that is to be computed, None without scale."""
        params = (self.quantization_params or {}).get(name)
        return None if params is None else int(params["quant_type"])

    def contains_tensor(self, tensor_name: str) -> bool:
        """Whether this graph computes or is given a tensor; constants do not count."""
        known = (self.value_infos, self.tensor_names, self.generated_value_names)
        return any(tensor_name in names for names in known)

    # --- codes -----------------------------------------------------------------------------------

    def free_name(self, name: str) -> str:
        """Return ``name``, or with a number where the model has one, and take it."""
        free, count = name, 0
        while self._is_taken(free):
            count += 1
            free = f"{name}_{count}"
        self._taken.add(free)
        return free

    def _is_taken(self, name: str) -> bool:
        return name in self._taken or (self.parent is not None and self.parent._is_taken(name))

    def calculate_quantization_params(self) -> dict[str, Any] | None:
        """Return scale, zero point and type of each tensor with a range; None without ranges."""
        return activation_params.activation_params(self)

    def _get_quantization_params(
        self, param_name: str, use_scale: float | None = None, use_zeropoint: int | None = None
    ) -> tuple[bool, str, str, Any, Any]:
        """Add scale and zero point of a tensor, once.

        Args:
            param_name: the tensor.
            use_scale: instead of the calibrated scale, together with ``use_zeropoint``.
            use_zeropoint: zero point.

        Returns:
            Whether there are any, name of the scale, of the zero point, and their shapes.
        """
        if param_name not in self._param_names:
            made = activation_params.param_tensors(self, param_name, use_scale, use_zeropoint)
            if made is None:
                logger.info("Quantization parameters for tensor:%r not specified", param_name)
                return False, "", "", "", ""
            for tensor in made:
                self.model.add_initializer(tensor)
            self._param_names[param_name] = made[0].name, made[1].name
        return True, *self._param_names[param_name], [], []

    def _get_dynamic_input_quantization_params(
        self, input_name: str, nodes_list: list[NodeProto], qType: int, initial_type: int
    ) -> tuple[str, str, list[int], list[int]]:
        """Append nodes that measure a tensor's range, in place; return scale and zero point."""
        return measured_ranges.measure(self, input_name, nodes_list, qType, initial_type)

    def _get_quantize_input_nodes(
        self,
        node: NodeProto,
        input_index: int,
        qType: int,
        given_scale_name: str | None = None,
        given_zp_name: str | None = None,
        initial_type: int | None = None,
    ) -> list[NodeProto] | None:
        """Return nodes that make codes of an input, the last of them those; None without scale."""
        given = None
        if given_scale_name is not None and given_zp_name is not None:
            given = given_scale_name, given_zp_name
        return code_inputs.quantize_nodes(self, node.input[input_index], qType, given, initial_type)

    def find_quantized_value(self, input_name: str) -> QuantizedValue | None:
        """Return the codes of a tensor, of this graph or of one around it."""
        found = self.quantized_value_map.get(input_name)
        if found is None and self.parent is not None and not self.is_local(input_name):
            return self.parent.find_quantized_value(input_name)
        return found

    def quantize_activation(
        self, node: NodeProto, indices: Sequence[int], from_subgraph: bool = False
    ) -> Inputs:
        """Quantize inputs of a node with the type of activations.

        Args:
            node: the float node.
            indices: of its inputs; an empty name gives empty names.
            from_subgraph: append the nodes to this graph.

        Returns:
            Names of codes, zero points and scales, and the nodes that make them, which the caller
            appends; four Nones where a scale is missing.
        """
        return _lists(code_inputs.quantize(self, node, indices, nested=from_subgraph))

    def quantize_weight(
        self,
        node: NodeProto,
        indices: Sequence[int],
        reduce_range: bool = False,
        op_level_per_channel: bool = False,
        axis: int = -1,
        from_subgraph: bool = False,
    ) -> Inputs:
        """Quantize inputs of a node, constants among them with the type of weights.

        Args:
            node: the float node.
            indices: of its inputs.
            reduce_range: 7 bits where the quantizer is asked for them.
            op_level_per_channel: a scale per channel where the quantizer is asked for them.
            axis: along which channels run.
            from_subgraph: append the nodes to this graph.

        Returns:
            As ``quantize_activation``.
        """
        how = code_inputs.Weight(reduce_range, op_level_per_channel, axis)
        return _lists(code_inputs.quantize(self, node, indices, how, nested=from_subgraph))

    def quantize_initializer(
        self,
        weight: TensorProto,
        qType: int,
        reduce_range: bool = False,
        keep_float_weight: bool = False,
    ) -> tuple[str, str, str]:
        """Quantize a constant with one scale, once.

        Args:
            weight: initializer of this graph.
            qType: ``TensorProto.DataType`` of the codes.
            reduce_range: 7 bits where the quantizer is asked for them.
            keep_float_weight: add only scale and zero point.

        Returns:
            Names of the codes, of the zero point and of the scale.
        """
        value = code_inputs.constant(self, weight.name, qType, reduce_range, keep_float_weight)
        return value.q_name, value.zp_name, value.scale_name

    def quantize_weight_per_channel(
        self,
        weight_name: str,
        weight_qType: int,
        channel_axis: int,
        reduce_range: bool = True,
        keep_float_weight: bool = False,
    ) -> tuple[str, str, str]:
        """Quantize a constant with a scale for each index of ``channel_axis``, once.

        Returns:
            Names of the codes, of the zero points and of the scales.
        """
        value = code_inputs.constant(
            self, weight_name, weight_qType, reduce_range, keep_float_weight, channel_axis
        )
        return value.q_name, value.zp_name, value.scale_name

    def quantize_bias_static(
        self, bias_name: str, input_name: str, weight_name: str, beta: float = 1.0
    ) -> str:
        """Add the int32 codes of a bias, and return their name.

        The scale is that of the products, so that the kernel just adds. Where int32 cannot hold
        the codes the scale of the weight grows first: look its codes up afterwards.

        Args:
            bias_name: a constant.
            input_name: the activation, quantized.
            weight_name: the weight, quantized.
            beta: what the bias is multiplied by.
        """
        return integer_bias.quantize_bias(self, bias_name, input_name, weight_name, beta)

    def adjust_single_weight_scale_if_needed(
        self,
        bias_val: Any,
        input_scale: Any,
        weight_scale: Any,
        weight_scale_dtype: Any,
        weight_name: str,
        bias_name: str,
        qrange: Any,
        multiplicative_epsilon: float,
        idx: int | None = None,
    ) -> tuple[bool, Any]:
        """Return whether a weight's scale must grow for int32 to hold a bias, and the scale."""
        del weight_name, bias_name, idx
        needed = multiplicative_epsilon * 2.0 * np.abs(bias_val) / float(qrange)
        product = float(np.asarray(input_scale).item()) * float(np.asarray(weight_scale).item())
        if not 0.0 < product < needed:
            return False, weight_scale
        scale = np.float64(np.asarray(weight_scale).item()) * (needed / product)
        return True, np.array(scale, dtype=weight_scale_dtype)

    def _adjust_weight_scale_for_int32_bias(
        self,
        input_scale: NDArray[Any],
        weight_scale: NDArray[Any],
        weight_name: str,
        bias_tp: TensorProto,
        is_per_channel: bool,
    ) -> tuple[bool, NDArray[Any] | None]:
        """Return whether scales of a weight must grow for int32 to hold a bias, and the scales."""
        del weight_name
        if not weight_scale.size:
            return False, None
        return integer_bias.grown_scale(bias_tp, input_scale, weight_scale, is_per_channel)

    def _requantize_weight(self, weight_name: str, new_scale: NDArray[Any]) -> None:
        """Replace the scale and the codes of a constant, in place."""
        integer_bias.requantize(self, weight_name, new_scale)

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
        return cast_node(made, value_name, TensorProto.FLOAT16)

    def _dequantize_outputs(self) -> None:
        """Append what makes the outputs of the graph float."""
        for output in self.model.graph().output:
            self.read_float(output.name)

    def _drop_dequantized_constants(self) -> None:
        """Remove float constants in whose place a DequantizeLinear node came, in place."""
        found = (self.model.get_initializer(n) for n in self.generated_value_names)
        self.model.remove_initializers([tensor for tensor in found if tensor is not None])

    def _reads_of_excluded_nodes(self) -> set[str]:
        """Return the constants that excluded nodes read: they stay float for all who read floats."""
        excluded = set(self.nodes_to_exclude or ())
        nodes = (node for node in self.model.nodes() if node.name in excluded)
        return {name for node in nodes for name in node_reads(node) if name in self.initializers}

    def note_value(
        self, name: str, q_name: str, scale_name: str, zp_name: str, code_type: int | None = None
    ) -> None:
        """Remember the codes of an activation."""
        self.quantized_value_map[name] = QuantizedValue(
            name, q_name, scale_name, zp_name, QuantizedValueType.Input, node_qtype=code_type
        )


def cast_node(source: str, made: str, data_type: int) -> NodeProto:
    """Return a Cast node that is named after its output."""
    return helper.make_node("Cast", [source], [made], f"{made}_Cast", to=data_type)


def _lists(made: tuple[list[QuantizedValue], list[NodeProto]] | None) -> Inputs:
    if made is None:
        return None, None, None, None
    values, nodes = made
    return (
        [value.q_name for value in values],
        [value.zp_name for value in values],
        [value.scale_name for value in values],
        nodes,
    )


def _has_gemm(node: NodeProto) -> bool:
    return node.op_type == "Gemm" or any(_has_gemm(n) for b in subgraphs(node) for n in b.node)


def _imports(model: ModelProto, domain: str) -> bool:
    return any(opset.domain == domain for opset in model.opset_import)


def _uses_domain(graph: GraphProto, domain: str) -> bool:
    return any(
        node.domain == domain or any(_uses_domain(body, domain) for body in subgraphs(node))
        for node in graph.node
    )
