"""Regions of interest of Resize, which onnxruntime permutes even where they are empty and unused.

Between convolutions of codes its layout optimizer moves Transpose nodes through a Resize. Where the
region is an initializer that is a graph input too, as in older files, it adds a node that gathers
its ends, two for each dimension, and with none there the session stops. With the ends of the whole
image in it the tensor means the same.

Source: HandleResize in onnxruntime/core/optimizer/transpose_optimization, as of 1.31.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

if TYPE_CHECKING:
    from qwrap.ort.qdq.scope import QuantizedGraph


def fill_unused_regions(quantizer: QuantizedGraph) -> None:
    """Give empty regions of quantized Resize nodes the ends of the whole image, in place."""
    for node in quantizer.quantized_nodes:
        if not _has_unused_region(node):
            continue
        name = node.input[1]
        region = quantizer.model.get_initializer(name)
        declared = quantizer.model.find_graph_input(name)
        rank = _rank(quantizer, node)
        if region is None or declared is None or 0 not in region.dims or not rank:
            continue
        if all(
            _has_unused_region(reader) and _rank(quantizer, reader) == rank
            for reader in quantizer.uses.readers(name)
        ):
            _fill(region, declared, rank)


def _has_unused_region(node: NodeProto) -> bool:
    if node.op_type != "Resize" or len(node.input) < 3 or not node.input[1]:
        return False
    modes = [a.s for a in node.attribute if a.name == "coordinate_transformation_mode"]
    return modes != [b"tf_crop_and_resize"] and list(node.input).count(node.input[1]) == 1


def _rank(quantizer: QuantizedGraph, node: NodeProto) -> int:
    """Return the number of dimensions of a Resize node's input; 0 if it is not known."""
    value = quantizer.value_infos.get(node.input[0])
    return 0 if value is None else len(value.type.tensor_type.shape.dim)


def _fill(region: TensorProto, declared: ValueInfoProto, rank: int) -> None:
    ends = np.array([0.0] * rank + [1.0] * rank, numpy_helper.to_array(region).dtype)
    declared.type.CopyFrom(helper.make_tensor_type_proto(region.data_type, ends.shape))
    region.CopyFrom(numpy_helper.from_array(ends, region.name))
