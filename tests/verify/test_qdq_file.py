import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qwrap.graph import OnnxGraph, read_model
from qwrap.model import ValuePoint, load
from qwrap.verify import verify
from qwrap.verify.qdq_file import QdqFile
from qwrap.verify.runtime import Runtime
from qwrap.verify.session import Mode
from qwrap.verify.tally import TensorTally


def optimised_op_types(model: bytes, folder) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4  # it warns that the file is for this processor only
    onnxruntime.InferenceSession(model, options)
    return sorted(n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node)


def skipped(file: QdqFile, graph: OnnxGraph) -> dict[str, str]:
    return {s.name: s.reason for s in file.tensors(graph)[1]}


def save(build, nodes, stored, folder, float_nodes, **kwargs) -> tuple[QdqFile, OnnxGraph]:
    onnx.save(build.model(nodes, stored, width=12, **kwargs), folder / "qdq.onnx")
    graph = OnnxGraph(read_model(build.model(float_nodes, [], width=12)))
    return QdqFile(folder / "qdq.onnx"), graph


def test_returning_codes_leaves_the_integer_kernels(make_pair, tmp_path) -> None:
    pair = make_pair()
    file = QdqFile(pair.path)
    tensors, _ = file.tensors(pair.model.graph)
    plain = optimised_op_types(pair.path.read_bytes(), tmp_path)
    assert plain.count("QLinearMatMul") == 2
    assert optimised_op_types(file.copy_with_codes(tensors), tmp_path) == plain


def test_a_renamed_output_is_found_behind_its_dequantize_linear(make_pair) -> None:
    pair = make_pair()
    tensors, _ = QdqFile(pair.path).tensors(pair.model.graph)
    assert [(t.name, t.codes, t.dequantized) for t in tensors] == [
        ("x", "x_codes", ("x_dq",)),
        ("h", "h_codes", ("h_dq",)),
        ("y", "y_codes", ("y",)),
    ]


RELU = helper.make_node("Relu", ["x"], ["y"])


def test_constants_and_unknown_tensors_are_skipped(build, tmp_path) -> None:
    nodes, stored = build.pair("w", "w", "w_dq", 0.1, 0)
    stored.append(build.constant("w", np.ones(12, np.float32)))
    nodes += [helper.make_node("Add", ["x", "w_dq"], ["new"])]
    more, tensors = build.pair("new", "new", "new_dq", 0.1, 0)
    nodes += [*more, helper.make_node("Relu", ["new_dq"], ["y"])]
    file, graph = save(build, nodes, stored + tensors, tmp_path, [RELU])
    assert skipped(file, graph) == {"w": "is a constant", "new": "is no tensor of the float model"}
    assert [t.name for t in file.tensors(None)[0]] == ["new"]


def test_a_scale_that_is_computed_is_skipped(build, tmp_path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["s"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "s"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    file, graph = save(build, nodes, [], tmp_path, [RELU])
    assert skipped(file, graph) == {"x": "its scale is computed while the model runs"}


def test_types_that_onnxruntime_lacks_are_skipped(build, tmp_path) -> None:
    kind = TensorProto.FLOAT4E2M1
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["c"], output_dtype=kind),
        helper.make_node("DequantizeLinear", ["c", "s"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    stored = [build.constant("s", np.float32(0.1))]
    file, graph = save(build, nodes, stored, tmp_path, [RELU], opset=23)
    assert skipped(file, graph) == {"x": "its codes are float4e2m1"}


@pytest.mark.parametrize(
    ("kind", "opset", "numbers"),
    [
        (TensorProto.FLOAT8E4M3FN, 19, [0.0, 2**-9, 1.0, 1.125, 448.0]),
        (TensorProto.FLOAT8E5M2, 19, [0.0, 2**-16, 1.0, 1.25, 57344.0]),
        (TensorProto.INT4, 21, [0, 1, 6, 7, -8]),
        (TensorProto.UINT4, 21, [0, 1, 6, 7, 15]),
        (TensorProto.INT2, 25, [0, 1, -1, -2, 1]),
    ],
)
def test_codes_that_numpy_lacks_are_counted_in_steps(
    build, tmp_path, kind: int, opset: int, numbers: list[float]
) -> None:
    zero = helper.make_tensor("z", kind, [], [0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    stored = [build.constant("s", np.float32(0.5)), zero]
    file, graph = save(build, nodes, stored, tmp_path, [RELU], opset=opset)
    (tensor,), _ = file.tensors(graph)
    values = np.zeros((1, 12), np.float32)
    values.flat[: len(numbers)] = np.float32(0.5) * np.array(numbers, np.float32)
    runtime = Runtime(file, Mode.LITERAL, (tensor,))
    codes = runtime.run({"x": values})[1][tensor.returned]
    tally = TensorTally(tensor)
    tally.add(torch.from_numpy(values), codes)
    assert tally.report().differing == 0
    wrong = values.copy()
    wrong.flat[0] = 0.5 * numbers[1]  # one number further, however small
    wrong.flat[4] *= 2  # what the type cannot hold
    tally.add(torch.from_numpy(wrong), codes)
    assert tally.report().differing == 2


def test_a_quantize_linear_in_a_branch_is_skipped(build, tmp_path) -> None:
    pair, stored = build.pair("x", "x", "x_dq", 0.1, 128)
    branch_out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    then = [*pair, helper.make_node("Relu", ["x_dq"], ["out"])]
    other = [helper.make_node("Neg", ["x"], ["out"])]
    branches = {
        "then_branch": helper.make_graph(then, "then", [], [branch_out], stored),
        "else_branch": helper.make_graph(other, "else", [], [branch_out]),
    }
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["b"], to=TensorProto.BOOL),
        helper.make_node("If", ["b"], ["y"], "choose", **branches),
    ]
    file, graph = save(build, nodes, [], tmp_path, [RELU])
    assert skipped(file, graph) == {"x": "inside then_branch of node 'choose'"}


class Grid(torch.nn.Module):
    """Fake quantization to signed integers, along the last axis or per tensor."""

    def __init__(self, scale: np.ndarray, zero_point: np.ndarray, low: int, high: int) -> None:
        super().__init__()
        self.scale, self.zero_point = torch.from_numpy(scale), torch.from_numpy(zero_point)
        self.low, self.high = low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = (torch.round(x / self.scale) + self.zero_point).clamp(self.low, self.high)
        return (codes - self.zero_point) * self.scale


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("per_axis", [False, True])
@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_every_integer_type_and_axis_compares_equal(
    build, tmp_path, dtype: type, per_axis: bool, domain: str
) -> None:
    rng = np.random.default_rng(0)
    limits = np.iinfo(dtype)
    shape = (12,) if per_axis else ()
    scale = np.asarray(rng.uniform(4, 6, shape) / (limits.max - limits.min), np.float32)
    zero = np.asarray(rng.integers(limits.min // 4, limits.max // 4, shape), dtype)
    stored = [build.constant("s", scale), build.constant("z", zero)]
    keywords = {"domain": domain, **({"axis": 1} if per_axis else {})}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["c"], **keywords),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"], **keywords),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    opset = 13 if domain else 21
    onnx.save(build.model(nodes, stored, width=12, opset=opset), tmp_path / "qdq.onnx")
    model = load(build.model([RELU], [], width=12))
    grid = Grid(scale, zero.astype(np.float32), limits.min, limits.max)
    model.attach({ValuePoint("x"): grid})
    x = rng.normal(0, 2, (50, 12)).astype(np.float32)
    (tensor,) = verify(model, tmp_path / "qdq.onnx", [x], progress=False).specification.tensors
    assert (tensor.dtype, tensor.elements) == (np.dtype(dtype).name, 600)
    assert (tensor.differing, tensor.sqnr) == (0, np.inf)


def test_each_quantize_linear_of_one_tensor_is_compared(build, tmp_path) -> None:
    nodes, stored = build.pair("x", "one", "x_one", 0.1, 128)
    more, tensors = build.pair("x", "two", "x_two", 0.2, 128)
    nodes += [*more, helper.make_node("Add", ["x_one", "x_two"], ["y"])]
    onnx.save(build.model(nodes, stored + tensors, width=12), tmp_path / "qdq.onnx")
    model = load(build.model([helper.make_node("Add", ["x", "x"], ["y"])], [], width=12))
    grid = Grid(np.float32([0.1]), np.float32([128]), 0, 255)
    model.attach({ValuePoint("x"): grid})
    x = np.random.default_rng(0).normal(0, 2, (50, 12)).astype(np.float32)
    one, two = verify(model, tmp_path / "qdq.onnx", [x], progress=False).specification.tensors
    assert (one.name, one.dequantized, one.differing) == ("x", ("x_one",), 0)
    assert (two.name, two.dequantized, two.differing > 0) == ("x", ("x_two",), True)


def test_external_data_is_found_beside_the_file(make_pair, tmp_path) -> None:
    pair = make_pair()
    (tmp_path / "inner").mkdir()
    moved = tmp_path / "inner" / "external.onnx"
    onnx.save(onnx.load(pair.path), moved, save_as_external_data=True, size_threshold=0,
              location="weights.bin")  # fmt: skip
    assert verify(pair.model, moved, pair.batches, progress=False).passed()
