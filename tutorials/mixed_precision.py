"""Mixed precision: types by hand, what each layer loses, and the best file within a budget.

Run it in any folder: ``python tutorials/mixed_precision.py``. It leaves two ONNX files, the front
of the search as ``front.png`` if matplotlib is there, and ``search.json``, from which a search that
was interrupted goes on.
"""

import importlib.util

import torch

import qwrap
from qwrap.demo import batches, digits, model_path

samples = batches("calibration")[:2]
images, labels = (torch.from_numpy(part[:500]) for part in digits("validation"))


def accuracy(model: torch.nn.Module) -> float:
    """Return the share of the images that are classified rightly."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


# 1. By hand: a part of the network in 16 bit, one layer with weights of 4 bits. Codes are converted
#    where types meet; the plan says how often.
config = qwrap.QConfig()
config.set("/separable/*", activation="uint16")
config.set("/head/Gemm", weight="int4")
model = qwrap.load(model_path())
print(qwrap.prepare(model, config).summary())
qwrap.calibrate(model, samples)
qwrap.export(model, "digits.by_hand.onnx")
print(qwrap.verify(model, "digits.by_hand.onnx", samples[:1]))

# 2. What each layer loses with weights of 4 bits, quantized alone.
found = qwrap.sensitivity(model_path(), samples, choices=["uint8/int8", "uint8/int4"])
print(found.summary())

# 3. The best file of 60 % of the bytes that 8 bits everywhere take.
result = qwrap.search(
    model_path(),
    samples,
    budget="bytes=0.6 x uint8/int8",
    metric=accuracy,
    choices=["uint8/int8", "uint8/int4", "float32"],
    points=4,
    resume="search.json",
)
print(result.summary())
if importlib.util.find_spec("matplotlib"):
    result.plot("front.png")

# 4. ``result.model`` simulates it; it can be trained as any other, and exported.
qwrap.export(result.model, "digits.searched.onnx")
for name, found in (("float", qwrap.load(model_path())), ("mixed", result.model)):
    print(f"{name}: {accuracy(found):.3f}")
