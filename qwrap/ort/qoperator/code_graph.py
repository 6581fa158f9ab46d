"""What is known of a graph that gets operators on codes: its tensors, their types and codes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from qwrap.graph import graphs, subgraphs
from qwrap.ort.base_quantizer import BaseQuantizer
from qwrap.ort.enums import QuantizationMode, QuantizedValueType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.graphs.scopes import made_names, node_reads
from qwrap.ort.graphs.tensor_types import TensorTypes
from qwrap.ort.onnx_model import ONNXModel
from qwrap.ort.qoperator import activation_params, code_inputs
from qwrap.ort.quant_utils import QuantizedValue, save_and_reload_model_with_shape_infer

logger = logging.getLogger(__name__)


class CodeGraph(BaseQuantizer):
    """The state of a quantizer to operators on codes, and look-ups in it.

    Attributes:
        mode: scales from ``tensors_range`` (QLinearOps), or measured at run time (IntegerOps).
        static: whether activations have scales in the file.
        parent: that of the graph around this one, None for the main graph.
        new_nodes: the nodes of the quantized graph so far.
        quantized_value_map: float tensor -> its codes.
        generated_value_names: float tensors that the quantized graph has so far.
        quantization_params: tensor -> scale, zero point and type, for those with a range.
    """

    parent: Any

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
        extra_options: Mapping[str, Any] | None = None,
        *,
        in_place: bool = False,
        parent: Any = None,
    ) -> None:
        """Take a model and say how to quantize it; ``quantize_model`` does it.

        Args:
            model: its main graph; only a copy is changed.
            per_channel: one scale per output channel of a weight.
            reduce_range: weights of 7 bits.
            mode: which operators to make.
            static: whether scales of activations come from ``tensors_range``.
            weight_qType: ``QuantType`` or its ``TensorProto`` number.
            activation_qType: likewise.
            tensors_range: ``TensorsData``, None for dynamic quantization.
            nodes_to_quantize: names, none for all.
            nodes_to_exclude: names.
            op_types_to_quantize: operators.
            extra_options: see ``qwrap.ort.entry.options``.
            in_place: edit ``model`` itself, which nobody else needs.
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
            in_place=in_place,
        )
        self.parent = parent
        if not isinstance(mode, QuantizationMode):
            raise QuantizationError(f"unsupported quantization mode {mode}")
        self.mode = mode
        self.static = static
        self._check_code_types()
        if not static and parent is None:
            self._split_gemms()
        self._start()

    def _start(self) -> None:
        """Begin with a graph in which nothing is quantized yet."""
        graph = self.model.graph()
        values = (*graph.output, *graph.input)
        self.fuse_dynamic_quant = self.opset_version > 10
        self.q_matmul_const_b_only = bool(self.extra_options.get("MatMulConstBOnly"))
        self.graph_scope = "/"
        self.new_nodes: list[NodeProto] = []
        self.quantized_value_map: dict[str, QuantizedValue] = {}
        self.generated_value_names: set[str] = self.model.get_non_initializer_inputs()
        self.tensor_names = dict.fromkeys((value.name for value in values), 1)
        self.tensor_names.update((name, 1) for node in graph.node for name in node.output)
        self.fixed_qrange_uint8_name = "fixed_quantization_range_uint8"
        self.fixed_qrange_int8_name = "fixed_quantization_range_int8"
        self.fixed_zero_name = "fixed_zero"
        self.fixed_zero_zp_name = "fixed_zero_zp"
        self.types = TensorTypes(self)
        self.quantization_params = self.calculate_quantization_params()
        self.constant_codes: dict[str, list[QuantizedValue]] = {}
        self.recurrent_weights: dict[str, tuple[str, str, str]] = {}
        self.scale_products: dict[str, str] = {}
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
        if any(entry[0].get("convert") for entry in self.tensor_quant_overrides.values() if entry):
            logger.warning("overrides: 'convert' has no effect in %s", form)
        overrides = {kind.tensor_type for kind in self.tensor_quant_override_qtypes}
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

    # --- graphs around this one ------------------------------------------------------------------

    def find_initializer_in_path(self, initializer_name: str) -> bool:
        """Whether this graph or one around it has that initializer."""
        return self.find_owner(initializer_name) is not None

    def find_owner(self, initializer_name: str) -> Any:
        """Return the quantizer of the innermost graph that has that initializer, or None."""
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

    def add_new_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Append nodes to the quantized graph."""
        for node in nodes:
            self.new_nodes.append(node)
            self.generated_value_names.update(node.output)

    # --- names -----------------------------------------------------------------------------------

    def free_name(self, name: str) -> str:
        """Return ``name``, or with a number where the model has one, and take it."""
        free, count = name, 0
        while self.is_taken(free):
            count += 1
            free = f"{name}_{count}"
        self._taken.add(free)
        return free

    def take(self, *names: str) -> None:
        """Remember that the graph has tensors of these names."""
        self._taken.update(names)

    def is_taken(self, name: str) -> bool:
        """Whether this graph, or one around it, has a tensor of that name."""
        return name in self._taken or (self.parent is not None and self.parent.is_taken(name))

    def note_value(
        self, name: str, q_name: str, scale_name: str, zp_name: str, code_type: int | None = None
    ) -> None:
        """Remember the codes of an activation."""
        self.quantized_value_map[name] = QuantizedValue(
            name, q_name, scale_name, zp_name, QuantizedValueType.Input, node_qtype=code_type
        )

    def _reads_of_excluded_nodes(self) -> set[str]:
        """Return the constants that nodes read which the user's names leave out.

        They stay float for all who read floats.
        """
        excluded, chosen = set(self.nodes_to_exclude or ()), set(self.nodes_to_quantize or ())
        read: set[str] = set()
        for node in (node for graph in graphs(self.model.graph()) for node in graph.node):
            if node.name in excluded or (chosen and node.name not in chosen):
                read |= node_reads(node)
        return read & self.initializers.keys()

    def calculate_quantization_params(self) -> dict[str, Any] | None:
        """Return scale, zero point and type of each tensor with a range; None without ranges."""
        return activation_params.activation_params(self)


def _has_gemm(node: NodeProto) -> bool:
    return node.op_type == "Gemm" or any(_has_gemm(n) for b in subgraphs(node) for n in b.node)
