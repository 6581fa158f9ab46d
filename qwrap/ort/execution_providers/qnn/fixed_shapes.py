"""Graph inputs of fixed shapes."""

from __future__ import annotations

import onnx

from qwrap.graph import graphs
from qwrap.ort.errors import QuantizationError
from qwrap.ort.files.model_io import declare_types


def fix_input_shapes(model: onnx.ModelProto, shapes: list[tuple[str, str]]) -> None:
    """Give graph inputs fixed shapes, in place; what follows from them is declared.

    Args:
        model: changed in place.
        shapes: name of an input and its shape, such as ``("x", "1,3,224,224")``.

    Raises:
        QuantizationError: there is no such input, or it cannot have the shape (a ``ValueError``).
    """
    inputs = {value.name: value for value in model.graph.input}
    for name, text in shapes:
        if name not in inputs:
            raise QuantizationError(
                f"Input {name} was not found in graph inputs. Valid input names are: "
                f"{','.join(inputs)}"
            )
        if not inputs[name].type.HasField("tensor_type"):
            raise QuantizationError(f"Input {name} is not a tensor")
        try:
            sizes = [int(size) for size in text.split(",")]
        except ValueError:
            raise QuantizationError(
                f"'{text}' is no shape of input {name}; give one such as '1,3,224,224'"
            ) from None
        _fix(model, inputs[name], sizes)
    declare_types(model)


def _fix(model: onnx.ModelProto, value: onnx.ValueInfoProto, sizes: list[int]) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(sizes):
        raise QuantizationError(
            f"Rank mismatch of input {value.name}. Existing:{len(dims)} Replacement:{len(sizes)}"
        )
    for index, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
        known = dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None
        if size < 1 or known not in (None, size):
            raise QuantizationError(
                f"Can't replace existing fixed size of {known} with {size} for dimension "
                f"{index + 1} of input {value.name}"
            )
        if dim.dim_param:
            _fix_symbol(model, dim.dim_param, size)
        dim.dim_value = size


def _fix_symbol(model: onnx.ModelProto, symbol: str, size: int) -> None:
    for graph in graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == symbol:
                    dim.dim_value = size
