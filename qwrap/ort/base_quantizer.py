"""What both quantizers share: which nodes, which ranges, and how constants become codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

from qwrap.graph import graphs
from qwrap.ort.borrowed import lender
from qwrap.ort.calibrate import TensorData
from qwrap.ort.errors import QuantizationError
from qwrap.ort.files.metadata import get_opset_version, model_has_infer_metadata
from qwrap.ort.files.model_io import read_model
from qwrap.ort.graphs.scopes import node_reads
from qwrap.ort.graphs.tensor_names import DEQUANT_OP_NAME, QUANT_OP_NAME
from qwrap.ort.numbers.added_constants import bias_tensors, constant_tensors, float_bias_tensors
from qwrap.ort.numbers.code_types import normalize_axis
from qwrap.ort.numbers.initializers import tensor_proto_to_array
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.numbers.ranges import adjusted_ranges
from qwrap.ort.numbers.weight_params import channel_params, tensor_params
from qwrap.ort.onnx_model import ONNXModel
from qwrap.ort.report import Report
from qwrap.ort.tensor_quant_overrides import TensorQuantOverridesHelper, normalized_overrides

__all__ = ["BaseQuantizer", "QuantizationParams"]

__getattr__ = lender(__name__)

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_SIGNED = (TensorProto.INT4, TensorProto.INT8, TensorProto.INT16, TensorProto.FLOAT8E4M3FN)


class BaseQuantizer:
    """A model that is being quantized, and what was asked for.

    Attributes:
        model: the quantizer's own copy, as an ``ONNXModel``.
        value_infos: declared types and shapes by tensor.
        initializers: constants of the main graph by name, as they were at first.
        opset_version: of ai.onnx.
        activation_qType: ``TensorProto.DataType`` of activations.
        weight_qType: of weights.
        tensors_range: ranges by tensor, None where they are measured at run time.
        nodes_to_quantize: names; empty for all.
        nodes_to_exclude: names.
        op_types_to_quantize: operator types.
        tensor_quant_overrides: what is said of single tensors.
        extra_options: as given.
        parent: the quantizer of the graph around, in bodies.
        report: what became of each node.
    """

    def __init__(
        self,
        model: ModelProto,
        per_channel: bool,
        reduce_range: bool,
        weight_qType: Any,
        activation_qType: Any,
        tensors_range: Any,
        nodes_to_quantize: Sequence[str] | None,
        nodes_to_exclude: Sequence[str] | None,
        op_types_to_quantize: Sequence[str],
        extra_options: Mapping[str, Any] | None = None,
        *,
        in_place: bool = False,
        mode: Any = None,
        static: Any = None,
    ) -> None:
        """Take over a model.

        Args:
            model: stays as it is, unless ``in_place``.
            per_channel: one scale per output channel of a weight.
            reduce_range: weights in half of the codes.
            weight_qType: ``QuantType`` or ``TensorProto.DataType`` of weights.
            activation_qType: of activations.
            tensors_range: tensor -> ``TensorData``, None where ranges are measured at run time.
            nodes_to_quantize: names; None or empty for all.
            nodes_to_exclude: names.
            op_types_to_quantize: operator types.
            extra_options: see ``qwrap.ort.OPTIONS``.
            in_place: edit ``model`` itself, which ``read_model`` returned and nobody else needs.
            mode: of older versions, without effect.
            static: of older versions, without effect.

        Raises:
            TypeError: a range is no ``TensorData``.
            QuantizationError: an override is wrong (a ``ValueError``).
        """
        del mode, static
        own = _own_model(model, in_place)
        self.model = ONNXModel(own)
        self.value_infos = {
            value.name: value
            for value in (*own.graph.value_info, *own.graph.output, *own.graph.input)
        }
        self.initializers = {tensor.name: tensor for tensor in own.graph.initializer}
        self.opset_version = get_opset_version(own)
        self.per_channel = per_channel
        self.reduce_range = reduce_range
        self.activation_qType: int = getattr(activation_qType, "tensor_type", activation_qType)
        self.weight_qType: int = getattr(weight_qType, "tensor_type", weight_qType)
        self.nodes_to_quantize = nodes_to_quantize
        self.nodes_to_exclude = nodes_to_exclude
        self.op_types_to_quantize = op_types_to_quantize
        self.parent: Any = None
        self.report = Report()
        self._read_options(extra_options or {})
        _check_ranges(tensors_range)
        self.tensors_range = tensors_range
        self._check_overrides(activation_qType)

    def _read_options(self, options: Mapping[str, Any]) -> None:
        self.extra_options = dict(options)
        self.enable_subgraph_quantization = bool(options.get("EnableSubgraph", False))
        self.force_quantize_no_input_check = bool(options.get("ForceQuantizeNoInputCheck", False))
        self._is_weight_symmetric: bool | None = options.get("WeightSymmetric")
        self.is_activation_symmetric = bool(options.get("ActivationSymmetric", False))
        self.is_activation_restricted_asymmetric = bool(
            options.get("ActivationRestrictedAsymmetric", False)
        )
        self.min_real_range: float | None = options.get("MinimumRealRange")
        self.tensor_quant_overrides = TensorQuantOverridesHelper(
            normalized_overrides(options.get("TensorQuantOverrides"))
        )

    def _check_overrides(self, activation_type: Any) -> None:
        self.tensor_quant_override_qtypes = self.tensor_quant_overrides.get_quant_types()
        if self.tensor_quant_overrides.empty():
            return
        constants, others = dict(self.initializers), set(self.value_infos)
        for graph in graphs(self.model.graph()):  # overrides may name tensors of bodies
            constants |= {tensor.name: tensor for tensor in graph.initializer}
            others |= {name for node in graph.node for name in (*node_reads(node), *node.output)}
            others |= {value.name for value in (*graph.input, *graph.output)}
        valid, wrong = self.tensor_quant_overrides.is_valid(constants, others, activation_type)
        if not valid:
            raise QuantizationError(f"{wrong}")

    # --- what is to be quantized -----------------------------------------------------------------

    def quantize_model(self) -> Any:
        """Quantize the model, in place, and return it."""
        raise NotImplementedError

    def is_weight_symmetric(self, weight_quant_type: int) -> bool:
        """Return whether weights of a type have the middle code as zero point."""
        if self._is_weight_symmetric is not None:
            return self._is_weight_symmetric
        return weight_quant_type in _SIGNED

    def is_input_a_initializer(self, input_name: str) -> bool:
        """Return whether a tensor is a constant of the main graph."""
        return self.model.get_initializer(input_name) is not None

    def is_per_channel(self) -> bool:
        """Return whether weights get one scale per output channel."""
        return self.per_channel

    def is_valid_quantize_weight(self, weight_name: str) -> bool:
        """Return whether a tensor is a constant of float32 or float16, here or around a body."""
        weight = self.model.get_initializer(weight_name)
        if weight is not None:
            return weight.data_type in _FLOATS
        if not self.enable_subgraph_quantization or self.parent is None:
            return False
        return bool(self.parent.is_valid_quantize_weight(weight_name))

    def should_quantize_node(self, node: NodeProto) -> bool:
        """Return whether a node is among those to quantize."""
        return self.reason_to_leave(node) is None

    def reason_to_leave(self, node: NodeProto) -> str | None:
        """Return why a node is not among those to quantize, None if it is."""
        if self.nodes_to_quantize and node.name not in self.nodes_to_quantize:
            return "not in nodes_to_quantize"
        if node.op_type not in self.op_types_to_quantize:
            return "operator type not in op_types_to_quantize"
        if node.op_type in (DEQUANT_OP_NAME, QUANT_OP_NAME):
            return "quantized in the input model"
        if self.nodes_to_exclude and node.name in self.nodes_to_exclude:
            return "in nodes_to_exclude"
        return None

    def adjust_tensor_ranges(self) -> None:
        """Narrow ranges to what operators let through, in a copy of ``tensors_range``."""
        if self.tensors_range is None:
            return
        every = self.enable_subgraph_quantization
        bodies = list(graphs(self.model.graph())) if every else [self.model.graph()]
        self.tensors_range = adjusted_ranges(self.tensors_range, bodies, self.should_quantize_node)

    # --- constants -------------------------------------------------------------------------------

    def _float_initializer(self, name: str) -> TensorProto:
        found: TensorProto | None = self.model.get_initializer(name)
        if found is None:
            raise QuantizationError(f"{name} is not an initializer")
        return found

    def quantize_bias_static_impl(
        self, bias_name: str, input_scale: Any, weight_scale: Any, beta: float = 1.0
    ) -> tuple[str, str, str, Any, str, int]:
        """Add the codes of ``beta`` times a bias, with their scale and zero point 0, to the model.

        The scale is ``input_scale * weight_scale``; the node must not multiply by ``beta`` again.
        Beside float8 weights the bias stays float.

        Args:
            bias_name: an initializer.
            input_scale: of the input, one.
            weight_scale: of the weight, one or one for each channel.
            beta: such as Gemm's.

        Returns:
            Names of codes, scale and zero point; the scales, flat; the operator that makes floats
            of the codes, and its type.

        Raises:
            QuantizationError: it is no float initializer, or not finite (a ``ValueError``).
        """
        bias = self._float_initializer(bias_name)
        if self.weight_qType == TensorProto.FLOAT8E4M3FN:
            tensors, scale = float_bias_tensors(bias, self.weight_qType, beta)
            node_type, kind = "Cast", bias.data_type
        else:
            tensors, scale = bias_tensors(bias, input_scale, weight_scale, beta)
            node_type, kind = "DequantizeLinear", self.weight_qType
        self.model.initializer_extend(tensors)
        codes, zero_point, scales = (tensor.name for tensor in tensors)
        return codes, scales, zero_point, scale, node_type, kind

    def quantize_initializer_impl(
        self,
        weight: TensorProto,
        qType: int,
        reduce_range: bool = False,
        keep_float_weight: bool = False,
    ) -> tuple[str, str, str]:
        """Add the codes of a constant, with one scale and zero point, to the model.

        Args:
            weight: an initializer of float32 or float16.
            qType: ``TensorProto.DataType`` of the codes, if overrides say nothing else.
            reduce_range: use half of the codes, if the quantizer does.
            keep_float_weight: add scale and zero point only.

        Returns:
            Names of codes, zero point and scale.

        Raises:
            QuantizationError: values that are not finite, or overrides of channels (a
                ``ValueError``).
        """
        entry = self.tensor_quant_overrides.get_per_tensor_overrides(weight.name, {})
        qType = _entry_type(entry, qType)
        is_weight = qType == self.weight_qType
        zero_point, scale = tensor_params(
            tensor_proto_to_array(weight),
            qType,
            entry,
            symmetric=(
                self.is_weight_symmetric(qType) if is_weight else self.is_activation_symmetric
            ),
            reduce_range=self.reduce_range and reduce_range,
            min_real_range=self.min_real_range,
        )
        return self._add_quantized(weight, qType, zero_point, scale, None, keep_float_weight)

    def quantize_weight_per_channel_impl(
        self,
        weight_name: str,
        weight_qType: int,
        channel_axis: int,
        reduce_range: bool = True,
        keep_float_weight: bool = False,
    ) -> tuple[str, str, str]:
        """Add the codes of a constant, with a scale and zero point per channel, to the model.

        Args:
            weight_name: an initializer of float32 or float16.
            weight_qType: as ``qType`` of ``quantize_initializer_impl``.
            channel_axis: along which channels run; may be negative.
            reduce_range: as in ``quantize_initializer_impl``.
            keep_float_weight: as in ``quantize_initializer_impl``.

        Returns:
            Names of codes, zero points and scales.

        Raises:
            QuantizationError: no such initializer or axis, overrides of another axis or of no
                channels, or values that are not finite (a ``ValueError``).
        """
        weight = self._float_initializer(weight_name)
        values = tensor_proto_to_array(weight)
        valid, axis = normalize_axis(channel_axis, values.ndim)
        if not valid:
            raise QuantizationError(
                f"Weight {weight_name} has a per-channel axis with value {channel_axis} that is "
                f"out-of-bounds for rank {values.ndim}"
            )
        entries = self._channel_entries(weight_name, axis, values.shape)
        weight_qType = _entry_type(entries[0], weight_qType)
        zero_point, scale = channel_params(
            values,
            weight_qType,
            axis,
            entries,
            symmetric=self.is_weight_symmetric(weight_qType),
            reduce_range=self.reduce_range and reduce_range,
            min_real_range=self.min_real_range,
        )
        return self._add_quantized(weight, weight_qType, zero_point, scale, axis, keep_float_weight)

    def _channel_entries(
        self, name: str, axis: int, shape: tuple[int, ...]
    ) -> Sequence[Mapping[str, Any]]:
        """Return what overrides say of the channels of a constant."""
        found = self.tensor_quant_overrides.get_per_channel_overrides(name, [{"axis": axis}])
        entries = found or [{"axis": axis}]
        if len(entries) not in (1, shape[axis]):
            raise QuantizationError(
                f"Per-channel tensor quantization overrides for {name} must have either 1 or "
                f"{shape[axis]} elements in the list of dictionaries."
            )
        valid, said = normalize_axis(entries[0]["axis"], len(shape))
        if not valid or said != axis:
            raise QuantizationError(
                f"Tensor quantization overrides for {name} specify an unexpected axis. Expected "
                f"{axis}, but got {entries[0]['axis']}."
            )
        return entries

    def _add_quantized(
        self,
        weight: TensorProto,
        qType: int,
        zero_point: Any,
        scale: Any,
        axis: int | None,
        keep_float_weight: bool,
    ) -> tuple[str, str, str]:
        tensors = constant_tensors(weight, qType, zero_point, scale, axis)
        self.model.initializer_extend(tensors[1:] if keep_float_weight else tensors)
        codes, zeros, scales = (tensor.name for tensor in tensors)
        return codes, zeros, scales


def _entry_type(entry: Mapping[str, Any], default: int) -> int:
    said = entry.get("quant_type")
    return default if said is None else int(said.tensor_type)


def _own_model(model: ModelProto, in_place: bool) -> ModelProto:
    """Return a model with declared types that may be edited."""
    if not model_has_infer_metadata(model):
        return read_model(model)
    if in_place:
        return model
    own = ModelProto()
    own.CopyFrom(model)
    return own


def _check_ranges(tensors_range: Any) -> None:
    values: Iterator[Any] = iter(tensors_range.values() if tensors_range is not None else ())
    wrong = {type(value) for value in values if not isinstance(value, TensorData)}
    if wrong:
        raise TypeError(f"tensors_range contains unexpected types {wrong}, not TensorData.")
