"""QuantizeLinear and DequantizeLinear nodes, with the names that onnxruntime's tool gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx import NodeProto, TensorProto, helper

from qwrap.ort.enums import QuantizedValueType
from qwrap.ort.errors import QuantizationError
from qwrap.ort.graphs.tensor_names import (
    DEQUANT_OP_NAME,
    QUANT_OP_NAME,
    add_dequant_output_suffix,
    add_dequant_suffix,
    add_quant_input_suffix,
    add_quant_output_suffix,
    add_quant_suffix,
)
from qwrap.ort.numbers.initializers import code_tensor, quantize_onnx_initializer, scale_tensor
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.numbers.quantized_values import QuantizedValue
from qwrap.ort.qdq.marks import (
    QDQScaleZpInitializers,
    QDQTensorQuantizedValue,
    QDQTensorScaleZpInitializers,
)

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph


def scale_and_zero_point(
    quantizer: QuantizedGraph, name: str, params: QuantizationParams, suffix: str = ""
) -> QDQScaleZpInitializers:
    """Add initializers ``<name>_scale<suffix>`` and ``<name>_zero_point<suffix>``; return them."""
    zero, scale = params["zero_point"], params["scale"]
    kind = TensorProto.FLOAT16 if scale.dtype.itemsize == 2 else TensorProto.FLOAT
    zero_name = quantizer.free_name(f"{name}_zero_point{suffix}")
    scale_name = quantizer.free_name(f"{name}_scale{suffix}")
    made = QDQScaleZpInitializers(
        scale_tensor(scale_name, scale, kind), code_tensor(zero_name, zero, params["quant_type"])
    )
    quantizer.add_tensors(made.zero_point, made.scale)
    return made


class PairWriter:
    """Writes the nodes of one graph's marked tensors into its ``GraphEdit``."""

    def __init__(self, quantizer: QuantizedGraph) -> None:
        self._quantizer = quantizer
        self._edit = quantizer.edit

    def weight(self, initializer: TensorProto, params: QuantizationParams) -> None:
        """Replace an initializer by its codes and a DequantizeLinear, or add a pair behind it."""
        name = initializer.name
        known = self._quantizer.scales.find(name)  # an output may share them, and came first
        scales = known.original if known else scale_and_zero_point(self._quantizer, name, params)
        settings: dict[str, Any] = {"axis": params.get("axis")}
        if params.get("block_size", 0):
            settings["block_size"] = params["block_size"]
        output = add_dequant_output_suffix(self._quantizer.stem(name))
        codes: str | None = None
        if self._quantizer.add_qdq_pair_to_weight:
            nodes = self._pair(name, output, self._quantizer.stem(name), scales, settings)
        else:
            codes = self._codes(initializer, params)
            nodes = [
                self._dequantize(
                    codes, output, add_dequant_suffix(self._quantizer.stem(name)), scales, settings
                )
            ]
        for graph in self._quantizer.graphs_that_read(name):
            graph.edit.insert(name, nodes)
            graph.edit.reads[name] = output
        value = QuantizedValue(
            name,
            codes or "",
            scales.scale.name,
            scales.zero_point.name,
            QuantizedValueType.Initializer,
            axis=params.get("axis"),
        )
        self._quantizer.quantized_value_map[name] = QDQTensorQuantizedValue(value, None, None)

    def _codes(self, initializer: TensorProto, params: QuantizationParams) -> str:
        codes = quantize_onnx_initializer(
            initializer,
            params["quant_type"],
            params["zero_point"],
            params["scale"],
            params.get("axis"),
            self._quantizer.free_name(f"{initializer.name}_quantized"),
            params.get("block_size", 0),
        )
        self._quantizer.add_tensors(codes)
        return codes.name

    def activation(self, name: str, scales: QDQTensorScaleZpInitializers) -> None:
        """Write the pair of an activation; one for each reader, or two in a row, as asked for."""
        receivers = self._quantizer.receivers(name)
        dedicated = self._quantizer.dedicated_qdq_pair and len(receivers) > 1
        if scales.converted is not None:
            if dedicated:
                raise QuantizationError(
                    f"tensor '{name}': Do not currently support converted quant_types in "
                    "TensorQuantOverrides when the `dedicated_qdq_pair` extra_option is enabled"
                )
            self._converted(name, scales.original, scales.converted, scales.converted_recv_nodes)
        elif dedicated:
            self._dedicated(name, scales.original, receivers)
        elif self._quantizer.is_read(name):
            self._shared(name, scales.original, receivers)
        else:  # all who read it read floats; its scale may still be another tensor's
            self._record(
                name, add_dequant_output_suffix(self._quantizer.stem(name)), scales.original
            )

    def _shared(
        self, name: str, scales: QDQScaleZpInitializers, receivers: list[NodeProto]
    ) -> None:
        """Write one pair for all who read the tensor."""
        source, output = name, add_dequant_output_suffix(self._quantizer.stem(name))
        if self._quantizer.is_renamed_output(name):
            source, output = add_quant_input_suffix(self._quantizer.stem(name)), name
            self._edit.floats[name] = source
        elif self._quantizer.is_left_float(name):
            for node in receivers:
                self._edit.node_reads[id(node), name] = output
        else:
            self._edit.reads[name] = output
        self._edit.insert(name, self._pair(source, output, self._quantizer.stem(name), scales))
        self._record(name, output, scales)

    def _dedicated(
        self, name: str, scales: QDQScaleZpInitializers, receivers: list[NodeProto]
    ) -> None:
        """Write a pair for each node that quantizes the tensor; others read floats."""
        stem = self._quantizer.stem(name)
        for number, node in enumerate(receivers, 1):
            output = f"{add_dequant_output_suffix(stem)}_{number}"
            self._edit.insert(name, self._pair(name, output, stem, scales, {}, f"_{number}"))
            self._edit.node_reads[id(node), name] = output
        self._record(name, f"{add_dequant_output_suffix(stem)}_1", scales)

    def _converted(
        self,
        name: str,
        scales: QDQScaleZpInitializers,
        converted: QDQScaleZpInitializers,
        wanted: set[str] | None,
    ) -> None:
        """Write a pair, and behind it one of another type for the nodes that want that.

        ``Q1 -> DQ1 -> Q2 -> DQ2`` where all want it. Where some do not, these read DQ1 and a
        second dequantizer of the first codes feeds Q2, so that each has one kind of reader. A
        graph output takes DQ2 if all nodes that quantize the tensor do, else DQ1.
        """
        stem = self._quantizer.stem(name)
        changed = f"{stem}_convert"
        receivers = self._quantizer.receivers(name)
        readers = receivers
        if wanted is not None:  # named nodes count even if they are not quantized themselves
            readers = [*receivers, *self._quantizer.uses.readers(name)]
        getting = [n for n in readers if wanted is None or n.name in wanted]
        staying = [n for n in receivers if wanted is not None and n.name not in wanted]
        if wanted is not None and not getting:
            self._shared(name, scales, receivers)
            return
        source = name
        first, second = add_dequant_output_suffix(stem), add_dequant_output_suffix(changed)
        if self._quantizer.is_renamed_output(name):
            source = add_quant_input_suffix(stem)
            self._edit.floats[name] = source
            first, second = (name, second) if staying else (first, name)
        nodes = self._pair(source, first, stem, scales)
        between = first
        if staying:
            between = add_quant_input_suffix(changed)
            clone = add_dequant_suffix(f"{changed}_clone")
            codes = add_quant_output_suffix(stem)
            nodes.append(self._dequantize(codes, between, clone, scales, {}))
        nodes += self._pair(between, second, changed, converted)
        self._edit.insert(name, nodes)
        for node in staying:
            self._edit.node_reads[id(node), name] = first
        for node in getting:
            self._edit.node_reads[id(node), name] = second
        self._quantizer.quantized_value_map[name] = QDQTensorQuantizedValue(
            self._value(name, first, scales), self._value(name, second, converted), wanted
        )

    def _record(self, name: str, output: str, scales: QDQScaleZpInitializers) -> None:
        value = self._value(name, output, scales)
        self._quantizer.quantized_value_map[name] = QDQTensorQuantizedValue(value, None, None)

    @staticmethod
    def _value(name: str, output: str, scales: QDQScaleZpInitializers) -> QuantizedValue:
        return QuantizedValue(
            name,
            output,
            scales.scale.name,
            scales.zero_point.name,
            QuantizedValueType.Input,
            scale_type=scales.scale.data_type,
        )

    def _pair(
        self,
        source: str,
        output: str,
        stem: str,
        scales: QDQScaleZpInitializers,
        settings: dict[str, Any] | None = None,
        postfix: str = "",
    ) -> list[NodeProto]:
        settings = settings or {}
        codes = add_quant_output_suffix(stem) + postfix
        quantize = helper.make_node(
            QUANT_OP_NAME,
            [source, scales.scale.name, scales.zero_point.name],
            [codes],
            add_quant_suffix(stem) + postfix,
            domain=self._quantizer.qdq_op_domain,
            **settings,
        )
        back = self._dequantize(codes, output, add_dequant_suffix(stem) + postfix, scales, settings)
        return [quantize, back]

    def _dequantize(
        self,
        codes: str,
        output: str,
        node_name: str,
        scales: QDQScaleZpInitializers,
        settings: dict[str, Any],
    ) -> NodeProto:
        return helper.make_node(
            DEQUANT_OP_NAME,
            [codes, scales.scale.name, scales.zero_point.name],
            [output],
            node_name,
            domain=self._quantizer.qdq_op_domain,
            **settings,
        )
