"""Fusions against onnxruntime's, and where those are wrong."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import fusions as incumbent
from onnxruntime.quantization.onnx_model import ONNXModel as IncumbentModel

from qwrap.ort import fusions
from qwrap.ort.onnx_model import ONNXModel

pytestmark = pytest.mark.ort(325)
CONSTANTS = {
    "one": 1.0,
    "half": 0.5,
    "two": 2.0,
    "root": math.sqrt(2),
    "unroot": math.sqrt(0.5),
    "epsilon": 1e-5,
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)


def parse(nodes: str, outputs: str = "float[2,3,8] y", version: int = 17) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {version}]> g (float[2,3,8] x, bool q) '
        f"=> ({outputs}) {{ {nodes} }}"
    )
    for name, value in CONSTANTS.items():
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    for name in ("scale", "bias"):
        model.graph.initializer.append(numpy_helper.from_array(random(8), name))
    return model


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return opened.run(None, {"x": random(2, 3, 8), "q": np.array(True)})


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


GELUS = {
    "half of x": "d=Div(x,root) e=Erf(d) a=Add(e,one) h=Mul(x,half) y=Mul(h,a)",
    "half at the end": "d=Div(x,root) e=Erf(d) a=Add(one,e) m=Mul(x,a) y=Mul(half,m)",
    "keras": "d=Div(x,root) e=Erf(d) a=Add(e,one) h=Mul(half,a) y=Mul(x,h)",
    "keras, computed root": "r=Sqrt(two) d=Div(x,r) e=Erf(d) a=Add(e,one) h=Mul(half,a) y=Mul(x,h)",
    "tensorflow": "d=Mul(unroot,x) e=Erf(d) a=Add(e,one) h=Mul(a,half) y=Mul(x,h)",
}
MEAN = "ReduceMean<axes=[-1]>"
NORMS = {
    "pow": f"m={MEAN}(x) d=Sub(x,m) p=Pow(d,two) v={MEAN}(p)",
    "mul": f"m={MEAN}(x) d=Sub(x,m) p=Mul(d,d) v={MEAN}(p)",
    "counted axis": (
        "m=ReduceMean<axes=[2]>(x) d=Sub(x,m) p=Pow(d,two) v=ReduceMean<axes=[-1]>(p)"
    ),
}
TAIL = " u=Add(v,epsilon) s=Sqrt(u) n=Div(d,s) w=Mul(n,scale) y=Add(w,bias)"


def test_every_method_of_onnxruntime_has_the_same_parameters() -> None:
    for name in ("Fusion", "FusionGelu", "FusionLayerNormalization", "ReplaceUpsampleWithResize"):
        ours, theirs = getattr(fusions, name), getattr(incumbent, name)
        for method, function in inspect.getmembers(theirs, inspect.isfunction):
            if method.startswith("_"):
                continue
            mine = list(inspect.signature(getattr(ours, method)).parameters)
            wanted = list(inspect.signature(function).parameters)
            assert mine[1:] == wanted[1:] or (method == "fuse" and len(mine) == len(wanted)), method


@pytest.mark.parametrize("form", GELUS)
def test_erf_becomes_gelu(form: str) -> None:
    ours, theirs = parse(GELUS[form]), parse(GELUS[form])
    want = run(ours)
    assert fusions.FusionGelu(ONNXModel(ours)).apply()
    assert incumbent.FusionGelu(IncumbentModel(theirs)).apply()
    assert ours == theirs
    assert operators(ours) == ["Gelu"]
    # what the constants leave out, some 1e-7 of values up to 3
    np.testing.assert_allclose(run(ours)[0], want[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", NORMS)
def test_arithmetic_becomes_layer_normalization(form: str) -> None:
    ours, theirs = parse(NORMS[form] + TAIL), parse(NORMS[form] + TAIL)
    want = run(ours)
    assert fusions.FusionLayerNormalization(ONNXModel(ours)).apply()
    assert incumbent.FusionLayerNormalization(IncumbentModel(theirs)).apply()
    assert ours == theirs
    assert operators(ours) == ["LayerNormalization"]
    # another order of sums over eight values
    np.testing.assert_allclose(run(ours)[0], want[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (GELUS["keras"].replace("half,a", "one,a"), "another factor"),
        (GELUS["keras"].replace("root", "two"), "another divisor"),
        (GELUS["keras"] + " z=Neg(a)", "read elsewhere"),
    ],
)
def test_what_is_not_gelu_is_left_alone(nodes: str, why: str) -> None:
    model = parse(nodes)
    before = copy.deepcopy(model)
    assert not fusions.FusionGelu(ONNXModel(model)).apply(), why
    assert model == before


def test_what_the_graph_gives_out_is_not_fused_away() -> None:
    """onnxruntime's removes the node that makes the second output."""
    text = "float[2,3,8] y, float[2,3,8] a"
    theirs = parse(GELUS["keras"], text)
    incumbent.FusionGelu(IncumbentModel(theirs)).apply()
    assert operators(theirs) == ["Gelu"]
    ours = parse(GELUS["keras"], text)
    assert not fusions.FusionGelu(ONNXModel(ours)).apply()


def test_what_a_body_reads_is_not_fused_away() -> None:
    body = (
        " z = If(q) <then_branch = t () => (float[2,3,8] i) { i = Neg(a) },"
        " else_branch = f () => (float[2,3,8] j) { j = Exp(x) }>"
    )
    model = parse(GELUS["keras"] + body, "float[2,3,8] y, float[2,3,8] z")
    assert not fusions.FusionGelu(ONNXModel(model)).apply()
    run(model)


@pytest.mark.parametrize("axis", [1, -2])
def test_a_mean_over_another_axis_is_not_layer_normalization(axis: int) -> None:
    """onnxruntime's fuses it: another result."""
    text = (NORMS["pow"] + TAIL).replace("[-1]", f"[{axis}]")
    theirs = parse(text)
    assert incumbent.FusionLayerNormalization(IncumbentModel(theirs)).apply()
    assert not fusions.FusionLayerNormalization(ONNXModel(parse(text))).apply()


def test_two_patterns_are_fused_and_named_apart() -> None:
    first = GELUS["half of x"].replace("y=", "x2=")
    names = ("d", "e", "a", "h")
    second = GELUS["half of x"]
    for name in names:
        second = second.replace(f"{name}=", f"{name}2=").replace(f"({name},", f"({name}2,")
        second = second.replace(f",{name})", f",{name}2)").replace(f"({name})", f"({name}2)")
    model = parse(f"{first} {second.replace('x', 'x2')}")
    want = run(model)
    assert fusions.FusionGelu(ONNXModel(model)).apply()
    assert [node.name for node in model.graph.node] == ["Gelu_fused_Erf_0", "Gelu_fused_Erf_1"]
    np.testing.assert_allclose(run(model)[0], want[0], rtol=0, atol=1e-6)


@pytest.mark.ort(318)
@pytest.mark.parametrize(
    ("version", "attributes"),
    [(7, "scales=[1.0,1.0,2.0,3.0]"), (8, "scales=[1.0,1.0,2.0,3.0]"), (9, "")],
)
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample_becomes_the_resize_of_the_same_pixels(
    version: int, attributes: str, mode: str
) -> None:
    """onnxruntime's centres the pixels, which Upsample did not."""
    scales = "" if attributes else ", k"
    comma = ", " if attributes else ""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {version}]> g (float[1,1,2,2] x) => (float[] y) '
        f'{{ y = Upsample<mode="{mode}"{comma}{attributes}>(x{scales}) }}'
    )
    weight = numpy_helper.from_array(np.array([1, 1, 2, 3], np.float32), "k")
    model.graph.initializer.append(weight)
    x = random(1, 1, 2, 2)

    def result() -> np.ndarray:
        opened = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return opened.run(None, {"x": x})[0]

    want = result()
    assert fusions.ReplaceUpsampleWithResize(ONNXModel(model), version).apply()
    model.opset_import[0].version = 11
    np.testing.assert_allclose(result(), want, rtol=1e-6)


def test_the_base_says_what_is_missing() -> None:
    fusion = fusions.Fusion(ONNXModel(parse("y = Relu(x)")), "A", "Relu")
    with pytest.raises(NotImplementedError, match="fuse"):
        fusion.apply()
    assert fusion.create_unique_node_name() == "A_fused_Relu_0"


def test_look_ups_of_the_base_are_onnxruntimes() -> None:
    model = parse(GELUS["keras"])
    ours = fusions.Fusion(ONNXModel(model), "A", "B")
    theirs = incumbent.Fusion(IncumbentModel(model), "A", "B")
    last = model.graph.node[4]
    for fusion in (ours, theirs):
        assert fusion.match_parent_path(last, ["Mul", "Add"]) == [*model.graph.node[3:1:-1]]
        assert fusion.match_parent_path(last, ["Mul", "Add"], [0, 0]) is None
        assert fusion.match_parent(last, "Mul", 5) is None
        assert fusion.match_first_parent(last, "Mul")[1] == 1
        assert fusion.find_first_child_by_type(model.graph.node[0], "Mul") is not None
        assert fusion.find_first_child_by_type(model.graph.node[0], "Mul", recursive=False) is None
        assert fusion.is_constant_with_specified_rank("scale", 1)
        assert not fusion.is_constant_with_specified_rank("x", 1)
        assert fusion.input_index("a", model.graph.node[3]) == 1
        assert fusion.tensor_shape_to_list(model.graph.input[0].type.tensor_type) == [2, 3, 8]
        assert fusion.has_constant_input(model.graph.node[2], 1.0)
    with pytest.raises(ValueError, match="2 operator types"):
        ours.match_parent_path(last, ["Mul", "Add"], [0])
