"""What became of a tensor: the names of its codes, scale and zero point."""

from __future__ import annotations

from typing import Any


class QuantizedInitializer:
    """A constant and its codes, as handed to operator classes.

    Attributes:
        name: of the initializer.
        initializer: the float one.
        rmins: smallest values, one for each scale.
        rmaxs: largest values.
        zero_points: one for each channel, or a scalar.
        scales: of the same shape.
        data: float values.
        quantized_data: codes.
        axis: along which channels run; None for one scale.
    """

    def __init__(
        self,
        name: str,
        initializer: Any,
        rmins: Any,
        rmaxs: Any,
        zero_points: Any,
        scales: Any,
        data: Any = (),
        quantized_data: Any = (),
        axis: int | None = None,
    ) -> None:
        self.name = name
        self.initializer = initializer
        self.rmins = rmins
        self.rmaxs = rmaxs
        self.zero_points = zero_points
        self.scales = scales
        self.data = data
        self.quantized_data = quantized_data
        self.axis = axis


class QuantizedValue:
    """A tensor that was quantized: an input, an output or a constant.

    Attributes:
        original_name: of the float tensor.
        q_name: of its codes.
        scale_name: of the initializer of its scale.
        zp_name: of the initializer of its zero point.
        value_type: a ``QuantizedValueType``.
        axis: along which channels run; None for one scale.
        node_type: operator that makes floats of the codes, if it is not DequantizeLinear.
        node_qtype: type of the codes.
        scale_type: type of the scale.
    """

    def __init__(
        self,
        name: str,
        new_quantized_name: str,
        scale_name: str,
        zero_point_name: str,
        quantized_value_type: Any,
        axis: int | None = None,
        node_type: str | None = None,
        node_qtype: int | None = None,
        scale_type: int | None = None,
    ) -> None:
        self.original_name = name
        self.q_name = new_quantized_name
        self.scale_name = scale_name
        self.zp_name = zero_point_name
        self.value_type = quantized_value_type
        self.axis = axis
        self.node_type = node_type
        self.node_qtype = node_qtype
        self.scale_type = scale_type


class BiasToQuantize:
    """A bias that waits for the scales of the other inputs of its node."""

    def __init__(self, bias_name: str, input_name: str, weight_name: str) -> None:
        self.bias_name = bias_name
        self.input_name = input_name
        self.weight_name = weight_name
