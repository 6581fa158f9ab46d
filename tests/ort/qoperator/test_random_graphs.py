"""Random graphs with shared weights, several readers and outputs: all load and are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models_of_text import batches, parse
from one_operator import Batch, run, sqnr
from onnx import ModelProto, TensorProto, numpy_helper
from quantizer_pairs import observe, quantize_own

pytestmark = pytest.mark.ort(249, 250, "G25", "G42", "G53")

# {y} is what a line makes, {a} and {c} are earlier tensors of 4 channels of 6 by 6
LINES = (
    "{y} = Conv<pads=[1,1,1,1]>({a}, w0, b0)",
    "{y} = Conv<pads=[1,1,1,1]>({a}, w0, b1)",
    "{y} = Conv({a}, w1, b1)",
    "{y} = Add({a}, {c})",
    "{y} = Add({a}, t)",
    "{y} = Mul({a}, s)",
    "{y} = Relu({a})",
    "{y} = Clip({a}, low, high)",
    "{y} = Sigmoid({a})",
    "{y} = LeakyRelu<alpha=0.1>({a})",
    "{y} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({a})",
    "{y} = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>({a})",
    "{y} = MatMul({a}, m)",
    "{y} = Transpose<perm=[0,1,3,2]>({a})",
    "{y}p, {y}q = Split<axis=1>({a}) {y} = Concat<axis=1>({y}q, {y}p)",
    "{y}c = Concat<axis=1>({a}, {c}) {y} = Conv({y}c, wide)",
    "{y} = Softmax<axis=1>({a})",
    "{y} = Tanh({a})",
    "{y}g = GlobalAveragePool({a}) {y} = Add({a}, {y}g)",
    "{y}d = Pad({a}, pads) {y} = MaxPool<kernel_shape=[3,3]>({y}d)",
    "{y}r = Reshape({a}, rows) {y} = Reshape({y}r, image)",
)
WEIGHTS: dict[str, Any] = {
    "w0": (4, 4, 3, 3),
    "w1": (4, 4, 1, 1),
    "wide": (4, 8, 1, 1),
    "b0": (4,),
    "b1": (4,),
    "t": (1, 4, 6, 6),
    "m": (6, 6),
    "s": np.array(1.5, np.float32),
    "low": np.array(0, np.float32),
    "high": np.array(2, np.float32),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "rows": np.array([-1, 144]),
    "image": np.array([-1, 4, 6, 6]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "static": {},
    "channels": {"activation": "QInt8", "per_channel": True},
    "forced": {"options": {"ForceQuantizeNoInputCheck": True}, "weight": "QUInt8"},
    "excluded": {},
    "incomplete": {},
    "dynamic": {},
    "dynamic channels": {"per_channel": True},
}


def random_model(rng: np.random.Generator, half: bool) -> ModelProto:
    made, text = ["x"], []
    for index in range(int(rng.integers(3, 9))):
        a = made[int(rng.integers(max(0, len(made) - 3), len(made)))]
        c = made[int(rng.integers(len(made)))]
        text.append(LINES[int(rng.integers(len(LINES)))].format(y=f"v{index}", a=a, c=c))
        made.append(f"v{index}")
    outputs = dict.fromkeys([made[-1], made[int(rng.integers(1, len(made)))]])
    kind = "float16" if half else "float"
    names = ", ".join(f"{kind} {name}" for name in outputs)
    model = parse(" ".join(text), WEIGHTS, f"{kind}[2,4,6,6] x", names)
    read = {name for node in model.graph.node for name in node.input}
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    for tensor in list(model.graph.initializer):
        if tensor.name not in read:
            model.graph.initializer.remove(tensor)
        elif half and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def data_of(half: bool) -> list[Batch]:
    kind = np.float16 if half else np.float32
    return [{"x": batch["x"].astype(kind)} for batch in batches({"x": (2, 4, 6, 6)}, count=2)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_every_graph_loads_and_is_right(seed: int, half: bool) -> None:
    rng = np.random.default_rng(seed)
    model, data = random_model(rng, half), data_of(half)
    wanted, ranges = [run(model, batch) for batch in data], observe(model, data)
    names = [node.name for node in model.graph.node]
    for name, setting in SETTINGS.items():
        changed, known = dict(setting), dict(ranges)
        if name == "excluded":
            changed["exclude"] = [names[int(rng.integers(len(names)))]]
        if name == "incomplete":
            del known[list(known)[int(rng.integers(len(known)))]]
        own = quantize_own(model, None if name.startswith("dynamic") else known, **changed)
        got = [run(own.model.model, batch) for batch in data]
        assert min(map(sqnr, wanted, got)) > 18, (name, model.graph.node)
