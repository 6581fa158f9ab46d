"""What operator classes ask of the QDQ quantizer, and what came of it, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from onnx import NodeProto, TensorProto

from qwrap.ort.errors import QuantizationError
from qwrap.ort.numbers.quantization_params import QuantizationParams
from qwrap.ort.numbers.quantized_values import QuantizedValue

Held = TypeVar("Held")


class QDQQuantTensorType(Enum):
    """What a marked tensor is; it decides between the types of activations and of weights."""

    ACTIVATION = 0
    WEIGHT = 1
    BIAS = 2


@dataclass
class QDQQuantParamProvider:
    """Whose parameters an output takes.

    Attributes:
        input_name: tensor that has them.
        node_name: node that reads it there, which matters where the tensor is converted.
    """

    input_name: str
    node_name: str


class QDQTensorQuantInfo:
    """A tensor marked for quantization; not a bias.

    Attributes:
        tensor_type: activation or weight.
        quant_para_provider: whose parameters it takes; None for its own.
        axis: along which a weight has a scale for each index; None for one scale.
        is_shared: whether it takes another tensor's parameters.
        data_type: ``TensorProto.DataType`` of its floats.
    """

    def __init__(
        self,
        tensor_type: QDQQuantTensorType = QDQQuantTensorType.ACTIVATION,
        quant_para_provider: QDQQuantParamProvider | None = None,
        axis: int | None = None,
        data_type: int | None = None,
    ) -> None:
        if data_type is None:
            raise QuantizationError("a tensor marked for quantization needs a data_type")
        self.tensor_type = tensor_type
        self.quant_para_provider = quant_para_provider
        self.axis = axis
        self.is_shared = quant_para_provider is not None
        self.data_type = data_type


@dataclass
class QDQBiasQuantInfo:
    """A bias marked to become int32 with the scale of the product that it is added to.

    Attributes:
        node_name: node that reads it.
        input_name: input whose scale is one factor.
        weight_name: weight whose scale is the other.
        beta: what the operator multiplies the bias by.
        node: the node itself, where it could be told.
        position: of the bias among its inputs.
    """

    node_name: str
    input_name: str
    weight_name: str
    beta: float
    node: NodeProto | None = None
    position: int = 2


@dataclass
class _Converted(Generic[Held]):
    """Something of a tensor as made, and as converted to another type for some who read it.

    Attributes:
        original: of the type that the tensor is made in.
        converted: of the type it is converted to; None if it is not.
        converted_recv_nodes: names of the nodes that read the converted one; None for all.
    """

    original: Held
    converted: Held | None
    converted_recv_nodes: set[str] | None

    def __post_init__(self) -> None:
        if self.converted_recv_nodes is not None:
            self.converted_recv_nodes = set(self.converted_recv_nodes)

    def get_for_consumer(self, consumer_node_name: str) -> Held:
        """Return what the node of that name reads."""
        if self.converted is None:
            return self.original
        receivers = self.converted_recv_nodes
        return (
            self.converted
            if receivers is None or consumer_node_name in receivers
            else self.original
        )


class QDQTensorQuantParams(_Converted[QuantizationParams]):
    """Scale and zero point of an activation."""


@dataclass
class QDQScaleZpInitializers:
    """Initializers that hold a scale and a zero point."""

    scale: TensorProto
    zero_point: TensorProto


class QDQTensorScaleZpInitializers(_Converted[QDQScaleZpInitializers]):
    """Initializers of an activation's scale and zero point."""


class QDQTensorQuantizedValue(_Converted[QuantizedValue]):
    """Names of a tensor's codes, scale and zero point."""
