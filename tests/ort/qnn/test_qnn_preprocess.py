"""Preprocessing for Qualcomm's provider against onnxruntime's."""

from __future__ import annotations

import inspect
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization.execution_providers import qnn as incumbent
from onnxruntime.quantization.execution_providers.qnn import preprocess as incumbent_module
from onnxruntime.quantization.execution_providers.qnn.fusion_spacetodepth import FusionSpaceToDepth
from onnxruntime.quantization.onnx_model import ONNXModel as IncumbentModel

from qwrap.ort.errors import QuantizationError
from qwrap.ort.execution_providers import qnn
from qwrap.ort.execution_providers.qnn import preprocess
from qwrap.ort.execution_providers.qnn.channel_last import update_io_to_channel_last

COMMAND = "qwrap.ort.execution_providers.qnn.preprocess"


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Do what ``python -m`` does, without another process."""
    monkeypatch.delitem(sys.modules, COMMAND, raising=False)
    monkeypatch.setattr(sys, "argv", [COMMAND, *arguments])
    runpy.run_module(COMMAND, run_name="__main__")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, shape).astype(np.float32)


def parse(text: str, weights: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for name, value in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


def run(model: onnx.ModelProto | Path, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = model if isinstance(model, Path) else model.SerializeToString()
    opened = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return opened.run(None, feeds)


def signature(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    return [
        (n.op_type, n.domain, n.name, *n.input, "=>", *n.output, *map(str, n.attribute))
        for n in model.graph.node
    ]


def values(model: onnx.ModelProto) -> dict[str, str]:
    return {v.name: str(v.type) for v in (*model.graph.input, *model.graph.output)}


def both(model: onnx.ModelProto, folder: Path, **options: object) -> list[onnx.ModelProto | None]:
    """What the two make of ``model``; None where they find nothing to do."""
    made: list[onnx.ModelProto | None] = []
    for module, name in ((qnn, "ours"), (incumbent, "theirs")):
        path = folder / f"{name}.onnx"
        own = onnx.ModelProto.FromString(model.SerializeToString())
        done = module.qnn_preprocess_model(own, path, **options)
        assert done is path.exists()
        made.append(onnx.load(path) if done else None)
    return made


GELU = "d=Div(x,root) e=Erf(d) a=Add(e,one) h=Mul(x,half) g=Mul(h,a)"
GELU_WEIGHTS = {
    "root": np.float32(np.sqrt(2)),
    "one": np.float32(1),
    "half": np.float32(0.5),
}
NORM = "n=ReduceL2<axes=[-1], keepdims=1>(x) c=Clip(n,low) s=Shape(x) e=Expand(c,s) y=Div(x,e)"


@pytest.mark.ort(338, 339, 340)
def test_gelu_is_fused_and_nodes_are_named(tmp_path: Path) -> None:
    model = parse(f"(float[2,4] x) => (float[2,4] y) {{ {GELU} y=Sqrt(g) }}", GELU_WEIGHTS)
    ours, theirs = both(model, tmp_path)
    assert signature(ours) == signature(theirs)
    assert [n.op_type for n in ours.graph.node] == ["Gelu", "Sqrt"]
    assert [n.name for n in ours.graph.node] == ["Gelu_fused_Erf_0", "qnn_preproc_node_0"]
    tags = {(p.key, p.value) for p in ours.metadata_props}
    assert tags == {(p.key, p.value) for p in theirs.metadata_props}


@pytest.mark.ort(338)
def test_nothing_is_written_where_nothing_is_to_do(tmp_path: Path) -> None:
    model = parse("(float[2,4] x) => (float[2,4] y) { y=Relu(x) }")
    model.graph.node[0].name = "named"
    assert both(model, tmp_path) == [None, None]
    ours, theirs = (
        inspect.signature(qnn.qnn_preprocess_model),
        inspect.signature(incumbent.qnn_preprocess_model),
    )
    assert {p.name: p.default for p in ours.parameters.values()} == {
        p.name: p.default for p in theirs.parameters.values()
    }


@pytest.mark.ort(339)
@pytest.mark.parametrize("shape", ["2,4", "N,4"])
def test_division_by_the_norm_is_fused(tmp_path: Path, shape: str) -> None:
    model = parse(f"(float[{shape}] x) => (float[{shape}] y) {{ {NORM} }}",
                  {"low": np.float32(1e-12)})  # fmt: skip
    ours, theirs = both(model, tmp_path)
    assert signature(ours) == signature(theirs)[-1:]  # theirs may leave the Shape, unread
    assert [n.op_type for n in ours.graph.node] == ["LpNormalization"]
    x = random(2, 4)
    np.testing.assert_allclose(run(ours, x=x)[0], run(model, x=x)[0], rtol=1e-6)


@pytest.mark.ort(339)
@pytest.mark.parametrize(
    ("old", "new"),
    [("axes=[-1]", "axes=[0]"), ("keepdims=1>(x)", "keepdims=1>(z)"), ("Div(x,e)", "Div(e,x)")],
)
def test_another_division_is_left_alone(tmp_path: Path, old: str, new: str) -> None:
    text = f"(float[2,4] x, float[2,4] z) => (float[2,4] y) {{ {NORM.replace(old, new)} }}"
    ours, _ = both(parse(text, {"low": np.float32(1e-12)}), tmp_path)
    assert "LpNormalization" not in {n.op_type for n in ours.graph.node}


@pytest.mark.ort(339)
def test_a_division_that_broadcasts_is_left_alone(tmp_path: Path) -> None:
    """onnxruntime's takes it for a normalization: the result loses a dimension."""
    text = NORM.replace("s=Shape(x)", "").replace("Expand(c,s)", "Expand(c,three)")
    model = parse(f"(float[2,4] x) => (float[3,2,4] y) {{ {text} }}",
                  {"low": np.float32(1e-12), "three": np.array([3, 2, 4])})  # fmt: skip
    ours, theirs = both(model, tmp_path)
    assert "LpNormalization" in {n.op_type for n in theirs.graph.node}
    x = random(2, 4)
    assert np.array_equal(run(ours, x=x)[0], run(model, x=x)[0])


@pytest.mark.ort(339)
@pytest.mark.parametrize("block", [2, 4])
def test_yolos_first_nodes_become_space_to_depth(tmp_path: Path, block: int) -> None:
    """onnxruntime's fusion looks for them after its optimizer has taken them apart."""
    n, c, h, w = 2, 3, 8, 12
    rows, columns, area = h // block, w // block, block * block
    weights = {
        "s1": np.array([n, c, rows, block, columns, block]),
        "s2": np.array([n, c, rows * columns, area]),
        "s3": np.array([n, c, area, rows, columns]),
        "s4": np.array([n, area * c, rows, columns]),
    }
    model = parse(
        f"""(float[{n},{c},{h},{w}] x) => (float[{n},{area * c},{rows},{columns}] y) {{
            a=Reshape(x,s1) b=Transpose<perm=[0,1,2,4,3,5]>(a)
            d=Reshape(b,s2) e=Transpose<perm=[0,1,3,2]>(d)
            f=Reshape(e,s3) g=Transpose<perm=[0,2,1,3,4]>(f)
            y=Reshape(g,s4) }}""",
        weights,
    )
    ours, theirs = both(model, tmp_path)
    assert "SpaceToDepth" not in {n.op_type for n in theirs.graph.node}
    assert [n.op_type for n in ours.graph.node] == ["SpaceToDepth"]
    fused = onnx.shape_inference.infer_shapes(model)
    assert FusionSpaceToDepth(IncumbentModel(fused)).apply()
    assert fused.graph.node[0].attribute == ours.graph.node[0].attribute
    x = random(n, c, h, w)
    assert np.array_equal(run(ours, x=x)[0], run(model, x=x)[0])


@pytest.mark.ort(339)
@pytest.mark.parametrize("version", [16, 17])
def test_layer_normalization_is_fused_on_demand_from_opset_17(
    tmp_path: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = parse(
        """(float[2,3,8] x) => (float[2,3,8] y) {
            m=ReduceMean<axes=[-1]>(x) d=Sub(x,m) p=Mul(d,d) v=ReduceMean<axes=[-1]>(p)
            u=Add(v,epsilon) s=Sqrt(u) n=Div(d,s) w=Mul(n,scale) y=Add(w,bias) }""",
        {
            "two": np.float32(2),
            "epsilon": np.float32(1e-5),
            "scale": random(8),
            "bias": random(8),
        },
    )
    model.opset_import[0].version = version
    ours, theirs = both(model, tmp_path, fuse_layernorm=True)
    assert signature(ours) == signature(theirs)
    fused = [n.op_type for n in ours.graph.node] == ["LayerNormalization"]
    assert fused == (version == 17)
    assert ("opset >= 17" in caplog.text) == (version == 16)


# --- layouts and shapes --------------------------------------------------------------------------


def picture() -> onnx.ModelProto:
    return parse(
        """(float[N,3,8,8] x, float[N,3,8,8] z, bool q) => (float[N,3,8,8] y, float[N,3,8,8] o) {
            r = Relu(x)
            y = Add(r, z)
            o = If(q) <then_branch = t () => (float[N,3,8,8] p) { p = Neg(x) },
                       else_branch = f () => (float[N,3,8,8] s) { s = Exp(y) }>
        }"""
    )


@pytest.mark.ort(340)
def test_channels_go_last_with_the_same_values(tmp_path: Path) -> None:
    """onnxruntime's leaves bodies reading the old layout."""
    options = {"inputs_to_make_channel_last": ["x"], "outputs_to_make_channel_last": ["y", "o"]}
    path = tmp_path / "o.onnx"
    assert qnn.qnn_preprocess_model(picture(), path, **options)
    x, z = random(2, 3, 8, 8), random(2, 3, 8, 8) + 1
    for branch in (True, False):
        want = run(picture(), x=x, z=z, q=np.array(branch))
        got = run(path, x=np.moveaxis(x, 1, -1), z=z, q=np.array(branch))
        for mine, other in zip(got, want, strict=True):
            assert np.array_equal(mine, np.moveaxis(other, 1, -1))


@pytest.mark.ort(340)
def test_transposes_and_names_are_onnxruntimes(tmp_path: Path) -> None:
    model = parse("(float[N,3,8,4] x) => (float[N,3,8,4] y) { r = Relu(x) y = Sqrt(r) }")
    options = {"inputs_to_make_channel_last": ["x"], "outputs_to_make_channel_last": ["y"]}
    ours, theirs = both(model, tmp_path, **options)
    assert signature(ours) == signature(theirs)
    assert values(ours) == values(theirs)
    assert {v.name for v in ours.graph.value_info} >= {"x_channel_first_0", "y_channel_first_0"}


@pytest.mark.ort(340)
@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["nowhere"], None, "nowhere is not a graph input"),
        (None, ["x"], "x is not a graph output"),
        (["q"], None, "rank >= 3"),
    ],
)
def test_what_has_no_channels_is_refused_and_nothing_changed(
    inputs: list[str] | None, outputs: list[str] | None, message: str
) -> None:
    model = picture()
    before = model.SerializeToString()
    with pytest.raises(ValueError, match=message):
        update_io_to_channel_last(model, ["x", *(inputs or [])], outputs)
    assert model.SerializeToString() == before
    with pytest.raises(ValueError, match=message):
        incumbent_module.update_io_to_channel_last(model, inputs, outputs)


@pytest.mark.ort(340)
def test_shapes_become_fixed(tmp_path: Path) -> None:
    model = parse(
        "(float[N,3,H,8] x, float[N,1,1,1] z) => (float[N,3,H,8] y) { y = Add(x, z) }",
    )
    options = {"dynamic_input_shapes": [("x", "2,3,5,8")]}
    ours, theirs = both(model, tmp_path, **options)
    assert signature(ours) == signature(theirs)
    assert values(ours) == values(theirs)
    assert "dim_param" not in str(values(ours))


@pytest.mark.ort(340)
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("nowhere", "1", "Valid input names are: x"),
        ("x", "1,3", "Rank mismatch"),
        ("x", "2,4,8,8", "existing fixed size of 3 with 4 for dimension 2"),
        ("x", "a,3,8,8", "no shape"),
        ("x", "0,3,8,8", "with 0 for dimension 1"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, name: str, shape: str, message: str) -> None:
    model = parse("(float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }")
    with pytest.raises(QuantizationError, match=message):
        qnn.qnn_preprocess_model(model, tmp_path / "o", dynamic_input_shapes=[(name, shape)])


@pytest.mark.ort(338)
def test_initializers_leave_the_inputs_on_demand(tmp_path: Path) -> None:
    model = parse("(float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }", {"w": random(2)})
    ours, theirs = both(model, tmp_path, exclude_initializer_from_input=True)
    assert [v.name for v in ours.graph.input] == [v.name for v in theirs.graph.input] == ["x"]


@pytest.mark.ort(338)
def test_the_input_stays_and_weights_go_where_they_are_told(tmp_path: Path) -> None:
    weights = {"w": random(40, 40)}
    model = parse("(float[2,40] x) => (float[2,40] y) { y = MatMul(x, w) }", weights)
    before = model.SerializeToString()
    folder = tmp_path / "made"
    folder.mkdir()
    qnn.qnn_preprocess_model(
        model,
        folder / "o.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        external_data_location="w.bin",
        external_data_convert_attribute=True,
    )
    assert model.SerializeToString() == before
    assert sorted(p.name for p in folder.iterdir()) == ["o.onnx", "w.bin"]
    x = random(2, 40)
    assert np.array_equal(run(folder / "o.onnx", x=x)[0], run(model, x=x)[0])


@pytest.mark.ort(341)
def test_the_command_does_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = parse(f"(float[N,4,5] x) => (float[N,4,5] y) {{ {GELU} y=Relu(g) }}", GELU_WEIGHTS)
    onnx.save(model, tmp_path / "m.onnx")
    command = ["-i", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx")]
    command += ["--inputs_to_make_channel_last", "x", "--outputs_to_make_channel_last", "y"]
    command += ["--dynamic_input_shapes", "x", "2,4,5", "--fuse_layernorm"]
    run_command(monkeypatch, *command)
    assert not capfd.readouterr().out
    made = onnx.load(tmp_path / "o.onnx")
    assert [n.op_type for n in made.graph.node] == ["Transpose", "Gelu", "Relu", "Transpose"]
    dims = made.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [2, 5, 4]


@pytest.mark.ort(341)
def test_the_command_has_onnxruntimes_arguments() -> None:
    both_ = ["-i", "a", "-o", "b"]
    given = preprocess.make_parser().parse_args(both_)
    names = set(inspect.signature(qnn.qnn_preprocess_model).parameters)
    assert set(vars(given)) == names - {"model_input", "model_output"} | {
        "input_model_path",
        "output_model_path",
    }
    assert given.external_data_size_threshold == 1024
