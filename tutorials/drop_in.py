"""A script for onnxruntime.quantization with one import changed, and what it can do besides.

Run it in any folder: ``python tutorials/drop_in.py``. It leaves ``digits.*.onnx`` there.
``tutorials/from_onnxruntime.md`` says what is the same, what is better and what differs.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from qwrap.demo import digits, model_path
from qwrap.ort import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_qat,
    quantize_static,
)
from qwrap.ort.matmul_nbits_quantizer import MatMulNBitsQuantizer
from qwrap.ort.report import Report

# 0. Fold BatchNormalization and constants first, as onnxruntime advises too.
quant_pre_process(model_path(), "digits.ready.onnx", skip_symbolic_shape=True)

images, labels = digits("calibration")
test_images, test_labels = (array[:1000] for array in digits("validation"))
float_model = onnx.load("digits.ready.onnx")
input_name = float_model.graph.input[0].name


class Reader(CalibrationDataReader):
    """Batches of 50 images, as for onnxruntime.quantization."""

    def __init__(self, count: int = 500) -> None:
        self.batches = iter(np.split(images[:count], count // 50))

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """Return the next batch by input name, or None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {input_name: batch}


def accuracy(model: onnx.ModelProto | str | Path) -> float:
    """Return the share of the test images that onnxruntime classifies right."""
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (logits, *_) = session.run(None, {input_name: test_images})
    return float((logits.argmax(1) == test_labels).mean())


print(f"float     {accuracy(model_path()):.4f}")

# 1. Static, in both forms: the same call, the same file.
for form in (QuantFormat.QDQ, QuantFormat.QOperator):
    path = f"digits.{form}.onnx"
    quantize_static(
        "digits.ready.onnx",
        path,
        Reader(),
        quant_format=form,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.Entropy,
    )
    print(f"{form!s:9} {accuracy(path):.4f}")

# 2. Dynamic; a model in memory comes back where no path is given, and is not modified.
quantized = quantize_dynamic(float_model, None, weight_type=QuantType.QUInt8)
print(f"dynamic   {accuracy(quantized):.4f}")

# 3. What was quantized, what was not, and why.
report = Report()
quantize_static(
    float_model,
    None,
    Reader(),
    activation_type=QuantType.QUInt8,
    nodes_to_exclude=[float_model.graph.node[0].name],
    report=report,
)
print(report)

# 4. A misspelt option or node is refused before any work.
try:
    quantize_static(float_model, None, Reader(), extra_options={"ActivationSymetric": True})
except ValueError as error:
    print(error)


# 5. Training: the function gets a torch module that computes what the quantized file computes.
def train(module: torch.nn.Module) -> None:
    """Take a few steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for start in range(0, len(x), 50):
        optimizer.zero_grad()
        part = slice(start, start + 50)
        torch.nn.functional.cross_entropy(module(x[part]), y[part]).backward()
        optimizer.step()


quantize_qat(
    float_model, "digits.qat.onnx", train=train, calibration_data_reader=Reader(), per_channel=True
)
print(f"trained   {accuracy('digits.qat.onnx'):.4f}")

# 6. Weights alone, in blocks of 4 bits, for models whose time goes into matrix products.
rng = np.random.default_rng(0)
head = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> head (float[N, 64] x) => (float[N, 32] y)'
    "{ y = MatMul(x, w) }"
)
weight = rng.normal(0, 0.1, (64, 32)).astype(np.float32)
head.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
quantizer = MatMulNBitsQuantizer(head, bits=4, block_size=32)
quantizer.process()
quantizer.model.save_model_to_file("digits.head.onnx")
print([node.op_type for node in onnx.load("digits.head.onnx").graph.node])
