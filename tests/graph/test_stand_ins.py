"""Types and shapes behind operators of com.microsoft."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper, parser

import qwrap
from qwrap.graph.stand_ins import STAND_INS

HEADER = '<ir_version: 10, opset_import: ["" : 16, "com.microsoft" : 1]>'


def types(body: str) -> dict[str, tuple[ir.DataType | None, tuple[object, ...] | None]]:
    model = parser.parse_model(f"{HEADER} agraph {body}")
    graph = qwrap.load(model).graph
    return {key: (kind.dtype, kind.shape) for key, kind in graph.types.items()}


def test_types_and_shapes_are_known_behind_fused_operators() -> None:
    known = types(
        """(float[2, 3, 5, 5] x, float[4, 3, 3, 3] w) => (y) {
            a = com.microsoft.FusedConv <activation = "Relu"> (x, w)
            b = com.microsoft.Gelu (a)
            c, d, e, f = com.microsoft.SkipLayerNormalization (b, b, g)
            y = com.microsoft.FusedMatMul <transB = 1> (c, c)
        }""".replace("w)", "w, float[3] g)", 1)
    )
    assert known["b"] == known["c"] == (ir.DataType.FLOAT, (2, 4, 3, 3))
    assert known["y"][0] == ir.DataType.FLOAT


def test_codes_have_the_type_of_their_zero_point() -> None:
    zero = helper.make_tensor("z", onnx.TensorProto.INT4, [], [1])
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "s")
    text = "(float[2, 3] x) => (float[2, 3] y) { c = com.microsoft.QuantizeLinear (x, s, z) "
    text += "y = com.microsoft.DequantizeLinear (c, s, z) }"
    model = parser.parse_model(f"{HEADER} agraph {text}")
    model.graph.initializer.extend([zero, scale])
    graph = qwrap.load(model, quantized="nodes").graph
    assert graph.type_of(graph.values["c"]).dtype == ir.DataType.INT4
    assert graph.type_of(graph.values["c"]).shape == (2, 3)


def test_stand_ins_are_operators_of_onnx() -> None:
    assert all(onnx.defs.has(op_type) for op_type, _, _ in STAND_INS.values())
