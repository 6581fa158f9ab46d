"""Types of the tensors of a graph that is being quantized."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from onnx import TensorProto

from qwrap.ort.errors import InvalidModelError

if TYPE_CHECKING:
    from qwrap.ort.qoperator.code_graph import CodeGraph

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)

logger = logging.getLogger(__name__)


class TensorTypes:
    """What the model declares of its tensors, graphs around it included."""

    def __init__(self, quantizer: CodeGraph) -> None:
        self._quantizer = quantizer

    def declared(self, name: str) -> int | None:
        """Return a tensor's ``TensorProto.DataType``; 0 where only its rank is known."""
        quantizer = self._quantizer
        constant = quantizer.model.get_initializer(name)
        if constant is not None:
            return int(constant.data_type)
        value = quantizer.value_infos.get(name)
        if value is not None and value.type.HasField("tensor_type"):
            return int(value.type.tensor_type.elem_type)
        if quantizer.parent is None or quantizer.is_local(name):
            return None
        found: int | None = quantizer.parent.types.declared(name)
        return found

    def find(self, name: str, mandatory: bool = False) -> int | None:
        """Return a tensor's type, or what the user says it is by default.

        Raises:
            InvalidModelError: it is ``mandatory``, and nothing says it (a ``RuntimeError``).
        """
        found = self.declared(name)
        if found or not mandatory:
            return found
        default = self._quantizer.extra_options.get("DefaultTensorType")
        if default is not None:
            logger.info("tensor %r has no type; DefaultTensorType is %d", name, default)
            return int(default)
        raise InvalidModelError(
            f"Unable to find data type for weight_name={name!r}. shape_inference failed to return "
            "a type probably this node is from a different domain or using an input produced by "
            "such an operator. This may happen if you quantize a model already quantized. You may "
            "use extra_options `DefaultTensorType` to indicate the default weight type, usually "
            "`onnx.TensorProto.FLOAT`."
        )

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of float32 or float16, as far as the model says."""
        found = self.declared(name)
        if found is None and name:
            logger.warning(
                "Failed to infer data type of tensor: %r. Please add data type info for this "
                "tensor if your model has customized operators.",
                name,
            )
        return found in FLOATS

    def is_half(self, name: str) -> bool:
        """Whether a tensor is of float16."""
        return self.declared(name) == TensorProto.FLOAT16
