"""What quantization takes in memory, beside onnxruntime's tool; and that nobody notices how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qwrap.ort import CalibrationMethod, QuantType, quantize_static
from qwrap.ort.files.model_io import STEERS_SHAPES, hold_model, read_model

WIDTH = 1024
LAYERS = 25  # of 4 MiB each
MIB = 1 << 20

RUN = """
import sys
import numpy as np

tool, source, target = sys.argv[1:]
if tool == "qwrap":
    import qwrap.ort as package
else:
    import onnxruntime.quantization as package
    import torch  # the other imports it, too

class Reader(package.CalibrationDataReader):
    left = 2

    def get_next(self):
        self.left -= 1
        return {"x": np.ones((1, 1024), np.float32)} if self.left >= 0 else None

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
package.quantize_static(source, target, Reader())
print(peak() - before)
"""


class Reader:
    """Three batches of normal values."""

    def __init__(self, width: int) -> None:
        rng = np.random.default_rng(5)
        self.batches = [rng.normal(size=(4, width)).astype(np.float32) for _ in range(3)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"x": self.batches.pop()} if self.batches else None


def chain(layers: int, width: int, opset: int = 17) -> onnx.ModelProto:
    """Products with weights, each followed by a Relu, and a shape at the end."""
    rng = np.random.default_rng(1)
    nodes, weights, value = [], [], "x"
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"m{i}"], name=f"product{i}"))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"h{i}"], name=f"relu{i}"))
        weight = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        value = f"h{i}"
    weights.append(numpy_helper.from_array(np.array([-1, 2, width // 2]), "shape"))
    nodes.append(helper.make_node("Reshape", [value, "shape"], ["y"], name="halves"))
    inputs = [helper.make_tensor_value_info("x", 1, ["N", width])]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def saved_outside(model: onnx.ModelProto, path: Path) -> Path:
    """Save with every tensor in a file beside the model, small ones too."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="weights", size_threshold=0)
    return path


def rise(tool: str, source: Path) -> int:
    """Return by how much quantizing raises the peak of a process, in bytes.

    It is that of the address space: ``ru_maxrss`` of a child starts from its parent's.
    """
    command = [sys.executable, "-W", "ignore", "-c", RUN, tool, source, f"{source}.{tool}.onnx"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.ort(275)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_static_quantization_takes_little_more_than_the_weights_once(tmp_path: Path) -> None:
    model = chain(LAYERS, WIDTH)
    weights = LAYERS * 4 * WIDTH * WIDTH
    source = saved_outside(model, tmp_path / "model.onnx")
    mine, theirs = rise("qwrap", source), rise("onnxruntime", source)
    assert mine < theirs
    assert mine < 2 * weights + 60 * MIB  # the rest: the first forward of torch, the codes twice


@pytest.mark.ort(2, 275)
@pytest.mark.parametrize("method", [CalibrationMethod.MinMax, CalibrationMethod.Entropy])
@pytest.mark.parametrize("types", [QuantType.QInt8, QuantType.QInt16])
def test_weights_in_files_in_the_message_and_in_memory_lead_to_one_model(
    tmp_path: Path, method: CalibrationMethod, types: QuantType
) -> None:
    # 16 bits raise the opset: what is calibrated then is not what was read.
    model = chain(3, 160)
    before = model.SerializeToString(deterministic=True)
    inside, outside = tmp_path / "inside.onnx", saved_outside(model, tmp_path / "outside.onnx")
    data = (tmp_path / "weights").read_bytes()
    onnx.save(model, inside)
    results = [
        quantize_static(
            source, None, Reader(160), activation_type=types, calibrate_method=method
        ).SerializeToString(deterministic=True)
        for source in (model, inside, outside)
    ]
    assert results[0] == results[1] == results[2]
    assert model.SerializeToString(deterministic=True) == before
    assert (tmp_path / "weights").read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside.onnx", "outside.onnx", "weights"]


@pytest.mark.ort(275)
def test_only_heavy_tensors_stay_in_files_until_they_are_needed(tmp_path: Path) -> None:
    source = saved_outside(chain(2, 160), tmp_path / "model.onnx")
    held = hold_model(source, in_files=True)
    for tensor in held.message.graph.initializer:
        is_outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert is_outside == (tensor.name != "shape")
        assert not is_outside or STEERS_SHAPES <= 4 * 160 * 160
    shapes = {v.name: v.type.tensor_type.shape for v in held.message.graph.output}
    assert [d.dim_value for d in shapes["y"].dim][1:] == [2, 80]  # inference saw the shape
    assert held.take_in() == read_model(source)
