"""Canonical form: constants evaluated, means pooled, and the shared models unharmed."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from qwrap.graph import read_model
from qwrap.graph.canonical import canonicalize, mean_to_global_pool, prelu_to_maximum
from qwrap.graph.constants import fold_constant_weights
from qwrap.graph.index import walk_nodes

SHARED = Path(os.environ.get("QWRAP_SHARED", Path(__file__).resolve().parents[2] / "../shared"))

# model -> operators that are gone from it
GONE = {
    "espnetv2_s2_voc_256": {"PRelu": 53},  # its BatchNormalizations follow Concat and Add
    "minilm_l6": {},  # its means are LayerNorms
    "mnist_cntk": {"Reshape": 1, "Add": 2},
    "mobilenetv2_cifar10_128": {"ReduceMean": 1},
    "nanodet_m_320": {},
    "ppocr_en_number_rec": {"BatchNormalization": 35, "Constant": 175},
    "resnet20_cifar10": {},
    "silero_vad": {},
    "squeezenet1_0_imagenet": {},
    "stories260k": {"Transpose": 1},
    "super_resolution": {},
}
CHANGED = {"Conv", "GlobalAveragePool", "Flatten", "Max", "Mul"}


def parse(graph: str, opset: int = 13, ir_version: int = 8, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX text with ``weights`` as initialisers; float64 ones become float32."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{header} {graph}")
    for name, array in weights.items():
        array = np.asarray(array)
        dtype = np.float32 if array.dtype == np.float64 else array.dtype
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), name))
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # unused initialisers of the shared models
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def assert_same_outputs(before: ir.Model, after: ir.Model, feeds: dict[str, np.ndarray]) -> None:
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        # A fold rounds weights once more, a pool sums in another order: some 1e-6 of the largest.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def inputs_of(name: str, count: int) -> Iterator[dict[str, np.ndarray]]:
    sys.path.insert(0, str(SHARED / "data"))
    try:
        from load import calib
    finally:
        sys.path.pop(0)
    for feeds, _ in calib(name, count):
        yield feeds


def assert_untouched_parts_are_identical(before: ir.Model, after: ir.Model) -> None:
    graphs = [ir.to_proto(model).graph for model in (before, after)]
    old = {n.SerializeToString(deterministic=True) for n in graphs[0].node}
    changed = [n for n in graphs[1].node if n.SerializeToString(deterministic=True) not in old]
    assert {n.op_type for n in changed} <= CHANGED
    read = {name for n in changed for name in n.input}
    tensors = {t.SerializeToString(deterministic=True) for t in graphs[0].initializer}
    new = {t.name for t in graphs[1].initializer if t.SerializeToString() not in tensors}
    assert new <= read | {"Parameter193_reshape1", "val_646"}  # names their reader knew already
    assert graphs[1].output == graphs[0].output
    assert after.metadata_props == before.metadata_props


@pytest.mark.parametrize("name", GONE)
def test_a_shared_model_computes_the_same_in_canonical_form(name: str) -> None:
    path = SHARED / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name}.onnx is not in {SHARED / 'models'}")
    before = read_model(path)
    after = before.clone()
    lines = canonicalize(after)
    types = [Counter(n.op_type for n in walk_nodes(m.graph)) for m in (before, after)]
    assert types[0] - types[1] == GONE[name]
    assert bool(lines) == bool(GONE[name])
    assert_untouched_parts_are_identical(before, after)
    if not lines:
        assert ir.to_proto(after) == ir.to_proto(before)
        return
    for feeds in inputs_of(name, 2):
        assert_same_outputs(before, after, feeds)


@pytest.mark.parametrize(
    ("chain", "shape"),
    [
        ("w = Reshape (k, to)", (3, 4)),
        ("w = Transpose <perm: ints = [1, 0]> (k)", (4, 3)),
        ("u = Unsqueeze (k, two) w = Squeeze (u, two)", (3, 4)),
        ("u = Identity (k) w = Cast <to: int = 1> (u)", (3, 4)),
    ],
)
def test_a_moved_constant_becomes_an_initialiser_of_the_same_name(
    chain: str, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    graph = f"g (float[2,3] x) => (float[2,4] y) {{ {chain} y = MatMul (x, w) }}"
    constants = {"to": np.int64([0, -1]), "two": np.int64([-1])}
    used = {k: v for k, v in constants.items() if f"{k})" in chain}
    before = parse(graph, k=rng.normal(size=shape), **used)
    after = before.clone()
    fold_constant_weights(after)
    assert [node.op_type for node in after.graph] == ["MatMul"]
    assert set(after.graph.initializers) == {"w"}
    assert_same_outputs(before, after, {"x": np.float32(rng.normal(size=(2, 3)))})


def test_constants_on_other_ways_stay() -> None:
    graph = """g (float[2,3] x) => (float[2,3] y, float[3] z) {
        a = Identity (k) y = Div (x, a) z = Identity (k) }"""
    assert not fold_constant_weights(parse(graph, k=np.ones(3)))


def test_reading_a_constant_node_does_not_rename_its_tensor() -> None:
    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Div (x, k) }", k=np.ones(3))
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    node = onnx.helper.make_node(
        "Constant", [], ["k"], value=numpy_helper.from_array(np.ones(3, np.float32), "inside")
    )
    proto.graph.node.insert(0, node)
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    canonicalize(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_listed_initialisers_stay_constant_when_a_new_one_raises_the_ir_version() -> None:
    graph = """g (float[1,1,2,2] x, float[1,1,1,1] w, float[1,1,1] k) => (float[1,1,2,2] y) {
        c = Conv (x, w) y = Add (c, k) }"""
    before = parse(graph, 8, 3, w=np.full((1, 1, 1, 1), 2.0), k=np.full((1, 1, 1), 3.0))
    after = before.clone()
    canonicalize(after)
    assert (after.ir_version, [v.name for v in after.graph.inputs]) == (4, ["x"])
    assert_same_outputs(before, after, {"x": np.ones((1, 1, 2, 2), np.float32)})


def test_a_file_of_ir_version_3_keeps_it_where_no_initialiser_is_new() -> None:
    graph = """g (float[1,1,2,2] x, float[1,1,1,1] w, float[1] b, float[1,1,1] k)
        => (float[1,1,2,2] y) { c = Conv (x, w, b) y = Add (c, k) }"""
    one = np.ones((1, 1, 1, 1))
    before = parse(graph, 8, 3, w=one, b=one.reshape(1), k=one.reshape(1, 1, 1))
    after = before.clone()
    canonicalize(after)
    assert (after.ir_version, [v.name for v in after.graph.inputs]) == (3, ["x", "w", "b"])
    assert_same_outputs(before, after, {"x": np.ones((1, 1, 2, 2), np.float32)})


def test_conv_bias_norm_scale_and_norm_fold_into_one_conv() -> None:
    rng = np.random.default_rng(1)
    graph = """g (float[1,2,4,4] x) => (float[1,3,4,4] y) {
        a = Conv (x, w) b = Add (a, k) c = BatchNormalization (b, k1, k2, k1, v)
        d = Mul (c, k) y = BatchNormalization (d, k2, k1, k2, v) }"""
    weights = {"w": rng.normal(size=(3, 2, 1, 1)), "k": rng.normal(size=(3, 1, 1))}
    more = {"k1": rng.normal(size=3), "k2": rng.normal(size=3), "v": rng.uniform(0.5, 2, 3)}
    before = parse(graph, **weights, **more)
    after = before.clone()
    assert len(canonicalize(after)) == 4
    assert [n.op_type for n in after.graph] == ["Conv"]
    assert_same_outputs(before, after, {"x": np.float32(rng.normal(size=(1, 2, 4, 4)))})


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_the_spatial_axes_becomes_a_pool(
    opset: int, keepdims: int, axes: list[int]
) -> None:
    listed = f"axes: ints = {axes}," if opset < 18 else ""
    shape = "1,3,1,1" if keepdims else "1,3"
    inputs = "x" if listed else "x, a"
    graph = f"""g (float[1,3,4,5] x) => (float[{shape}] y) {{
        [mean] y = ReduceMean <{listed} keepdims: int = {keepdims}> ({inputs}) }}"""
    before = parse(graph, opset, **({} if listed else {"a": np.int64(axes)}))
    after = before.clone()
    assert mean_to_global_pool(after) == ["ReduceMean 'mean': replaced by GlobalAveragePool"]
    names = [(n.op_type, n.name) for n in after.graph]
    assert names == [("GlobalAveragePool", "mean"), ("Flatten", "mean_flatten")][: 2 - keepdims]
    assert not after.graph.initializers
    x = np.random.default_rng(2).normal(size=(1, 3, 4, 5))
    assert_same_outputs(before, after, {"x": np.float32(x)})


@pytest.mark.parametrize(
    "body",
    [
        "y = ReduceMean <axes: ints = [3]> (x)",
        "y = ReduceMean <axes: ints = [1, 2, 3]> (x)",
        "y = ReduceMean (x)",
        "m = ReduceMean <axes: ints = [2, 3]> (x) y = Sub (x, m)",
        "s = Pow (x, x) y = ReduceMean <axes: ints = [2, 3]> (s)",
        "s = Squeeze (x, a) y = ReduceMean <axes: ints = [2]> (s)",
    ],
)
def test_other_means_stay(body: str) -> None:
    model = parse(f"g (float[1,3,4,5] x) => (y) {{ {body} }}", a=np.int64([0]))
    assert not mean_to_global_pool(model)


def test_a_prelu_of_slopes_up_to_1_is_the_larger_of_two() -> None:
    body = "g (float[2,3,4] x) => (float[2,3,4] y) { y = PRelu (x, slope) }"
    before = parse(body, slope=np.array([[-0.5], [0.25], [1.0]]))
    after = before.clone()
    assert prelu_to_maximum(after) == ["PRelu 'y': replaced by Mul and Max"]
    assert [n.op_type for n in after.graph] == ["Mul", "Max"]
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    x[0, 0, :2] = 0.0, -0.0
    np.testing.assert_array_equal(run(after, {"x": x})[0], run(before, {"x": x})[0])


def test_a_prelu_with_a_steeper_slope_stays() -> None:
    model = parse(
        "g (float[2,3] x) => (float[2,3] y) { y = PRelu (x, s) }", s=np.array([0.1, 2, 0])
    )
    assert prelu_to_maximum(model) == []
    assert [n.op_type for n in model.graph] == ["PRelu"]
