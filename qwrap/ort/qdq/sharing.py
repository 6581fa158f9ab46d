"""Which initializers hold a tensor's scale and zero point, its own or those of another tensor."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from onnx import NodeProto, TensorProto

from qwrap.ort.errors import QuantizationError
from qwrap.ort.qdq.marks import (
    QDQScaleZpInitializers,
    QDQTensorQuantInfo,
    QDQTensorScaleZpInitializers,
)
from qwrap.ort.qdq.pairs import scale_and_zero_point
from qwrap.ort.qdq.ranges import has_own_params

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph


logger = logging.getLogger(__name__)


class TensorScales:
    """Scales and zero points of the tensors of one graph; initializers are added when asked for.

    An output shares the parameters of an input where its operator passes values through, unless
    the user gave it other ones, or the input has none that a single pair could use.
    """

    def __init__(self, quantizer: QuantizedGraph) -> None:
        self._quantizer = quantizer
        self._known: dict[str, QDQTensorScaleZpInitializers] = {}
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def find(self, name: str) -> QDQTensorScaleZpInitializers | None:
        """Return the initializers of a tensor of this graph or one around it; None if it has none.

        Raises:
            QuantizationError: a marked tensor of the main graph has no range (a ``ValueError``).
        """
        owner = self._quantizer.owner_of(name)
        if owner is not self._quantizer:
            outer: TensorScales = owner.scales
            return outer.find(name)
        if name not in self._known and name not in self._asked:
            self._asked.add(name)
            found = self._make(name)
            if found is not None:
                self._known[name] = found
        return self._known.get(name)

    def _make(self, name: str) -> QDQTensorScaleZpInitializers | None:
        quantizer = self._quantizer
        if name in quantizer.tensor_to_producing_dq:
            return self._of_dequantizer(quantizer.tensor_to_producing_dq[name])
        info = quantizer.tensors_to_quantize.get(name)
        if info is None:
            return None
        if name in quantizer.initializer_quant_params:
            params = quantizer.initializer_quant_params[name]
            return _alone(scale_and_zero_point(quantizer, name, params))
        shared = self._shared(name, info)
        own = quantizer.quantization_params.get(name)
        if own is None and shared is None:
            if quantizer.parent is not None:  # in a branch that no batch took
                logger.warning("tensor '%s' stays float: calibration did not see it", name)
                return None
            raise QuantizationError(
                f"Quantization parameters are not specified for param {name}. In static mode "
                "quantization params for inputs and outputs of nodes to be quantized are required."
            )
        converted = None
        if own is not None and own.converted is not None:
            converted = scale_and_zero_point(quantizer, name, own.converted, "_convert")
        if shared is None and own is not None:
            shared = scale_and_zero_point(quantizer, name, own.original)
        assert shared is not None
        receivers = None if own is None else own.converted_recv_nodes
        return QDQTensorScaleZpInitializers(shared, converted, receivers)

    def _shared(self, name: str, info: QDQTensorQuantInfo) -> QDQScaleZpInitializers | None:
        """Return the initializers that an output takes from an input; None for its own."""
        if info.quant_para_provider is None:
            return None
        provider = info.quant_para_provider
        found = self.find(provider.input_name)
        if found is None:
            return None
        shared = found.get_for_consumer(provider.node_name)
        said = self._quantizer.tensor_quant_overrides.get_per_tensor_overrides(name, {})
        own = name in self._quantizer.quantization_params and has_own_params(
            said or {}, shared.zero_point.data_type
        )
        # scales of channels belong to the axis of another tensor
        return None if own or _elements(shared.scale) != 1 else shared

    def _of_dequantizer(self, node: NodeProto) -> QDQTensorScaleZpInitializers | None:
        """Return the initializers of a DequantizeLinear that the float model had."""
        if len(node.input) < 3:
            return None
        scale = self._quantizer.find_initializer(node.input[1])
        zero = self._quantizer.find_initializer(node.input[2])
        if scale is None or zero is None:
            return None
        return _alone(QDQScaleZpInitializers(scale, zero))


def _alone(made: QDQScaleZpInitializers) -> QDQTensorScaleZpInitializers:
    return QDQTensorScaleZpInitializers(made, None, None)


def _elements(tensor: TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
