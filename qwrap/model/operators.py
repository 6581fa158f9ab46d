"""What computes a node, to be called apart from the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwrap.model.attributes import attributes_of, tensors_to_torch
from qwrap.model.wrapped import WrappedModel


def function_of_node(model: WrappedModel, key: str) -> Callable[..., Any] | None:
    """Return a function of a node's inputs, as a kernel of a ``Program`` receives them.

    It returns what a kernel has to: the output, or a tuple where the node has several. None if
    there is no such function: for control flow, for nodes that compute shapes, and for operators
    that have to be told more than their inputs and attributes, such as a device.
    """
    operator = model.layout.values.operators.get(key)
    if operator is None or operator.wants_output_count or operator.wants_device:
        return None
    if operator.wants_dtype or operator.wants_element_type:
        return None
    if operator.prepare is not None:
        keywords: dict[str, Any] = {"prepared": model.layout.values.prepared[key]}
    else:
        attributes = attributes_of(model.graph.nodes[key])
        keywords = operator.keywords(tensors_to_torch(attributes))
    function = operator.function
    picks = operator.returns_tuple and len(model.graph.nodes[key].outputs) == 1

    def compute(*inputs: Any) -> Any:
        result = function(*inputs, **keywords)
        return result[0] if picks else result

    return compute
