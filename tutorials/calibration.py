"""Calibrate once, then ask again: methods, statistics files, tables of other tools, formats.

Run it in any folder: ``python tutorials/calibration.py``. It leaves ``digits.safetensors``,
``digits.encodings`` and two ONNX files there.
"""

import torch

import qwrap
from qwrap.demo import batches, digits, model_path

images = torch.from_numpy(digits("validation")[0][:250])
samples = batches("calibration")[:4]
with torch.no_grad():
    wanted = qwrap.load(model_path()).eval()(images)


def error(model: qwrap.WrappedModel) -> float:
    """Return how far the quantized outputs are from the float ones, as a share."""
    with torch.no_grad():
        return float((model(images) - wanted).norm() / wanted.norm())


# 1. One pass over the data. Every tensor keeps its range and a histogram, of a fixed size.
model = qwrap.load(model_path()).eval()
qwrap.prepare(model)
qwrap.calibrate(model, samples)

# 2. What was observed answers every method, without the data.
for method in ("minmax", "percentile", "mse", "l1", "entropy", "auto"):
    qwrap.rescale(model, method=method)
    print(f"{method:10s} {error(model):.4f}")

# 3. It can be kept. The file fits this model alone; those of several machines can be merged.
statistics = qwrap.Statistics.of(model)
statistics.save("digits.safetensors")
print(statistics.summary())

other = qwrap.load(model_path()).eval()
qwrap.prepare(other, qwrap.QConfig(activation="int8"))
qwrap.rescale(other, qwrap.Statistics.load("digits.safetensors"))
print(f"int8       {error(other):.4f}")

# 4. Ranges go to other tools and come from them.
qwrap.RangeTable.of(model).write("digits.encodings", "aimet-1.0.0")
third = qwrap.load(model_path()).eval()
qwrap.prepare(third)
qwrap.rescale(third, qwrap.RangeTable.read("digits.encodings"))
assert abs(error(third) - error(model)) < 1e-6
qwrap.export(third, "digits.int8.onnx")

# 5. Other formats: weights alone, in blocks of 4-bit integers with a scale each.
blocks = qwrap.QuantSpec(dtype="int4", block_size=16)
fourth = qwrap.load(model_path()).eval()
print(qwrap.prepare(fourth, qwrap.QConfig(activation=None, weight=blocks)).summary())
qwrap.calibrate(fourth, samples)
print(f"int4       {error(fourth):.4f}")
qwrap.export(fourth, "digits.int4.onnx")
