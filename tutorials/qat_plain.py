"""Quantization-aware training in a plain loop: 2-bit weights, a checkpoint, a verified file.

Run it in any folder: ``python tutorials/qat_plain.py``. It leaves ``checkpoint.pt`` and
``digits.int2.onnx`` there.
"""

import onnxruntime
import torch

import qwrap
from qwrap.demo import batches, digits, model_path

STEPS, STOP = 30, 15
images, labels = (torch.from_numpy(array) for array in digits("train"))
test_images, test_labels = (torch.from_numpy(array[:500]) for array in digits("validation"))


def accuracy(logits: torch.Tensor) -> float:
    """Return the share of the test images that have the largest logit at their label."""
    return (logits.argmax(1) == test_labels).float().mean().item()


# 1. Prepare and calibrate, as without training: weights of 2 bits, those next to input and output
#    of 8. Training starts from these scales, and learns them along with the weights (LSQ).
config = qwrap.QConfig(weight="int2", first_last_8bit=True, scope="kernels")
model = qwrap.load(model_path())
qwrap.prepare(model, config)
qwrap.calibrate(model, batches("calibration")[:4])
with torch.no_grad():
    calibrated = accuracy(model.eval()(test_images))

# 2. Train, as any module. ``param_groups`` keeps decay off scales and biases, and gives scales a
#    learning rate of their own: it is relative, 0.01 moves a scale by about 1 % in each step.
torch.manual_seed(0)


def training(model: qwrap.WrappedModel) -> tuple[torch.optim.Optimizer, qwrap.train.Schedule]:
    """Return the optimizer, and what says when scales are learned: not in the first steps."""
    groups = qwrap.param_groups(model.train(), lr=2e-3, weight_decay=1e-4, scale_lr=1e-2)
    return torch.optim.AdamW(groups), qwrap.train.Schedule(model, STEPS, learn_scales=0.1)


def train(steps: int) -> None:
    """Take so many steps, in place."""
    for _ in range(steps):
        part = torch.randint(len(images), (32,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        schedule.step()


optimizer, schedule = training(model)
train(STOP)
parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
torch.save({name: part.state_dict() for name, part in parts.items()}, "checkpoint.pt")

# 3. Resume: the same file, prepared with the same settings. The ``state_dict`` brings everything
#    that calibration and training found out; load it before the optimizer is made.
saved = torch.load("checkpoint.pt", weights_only=True)
model = qwrap.load(model_path())
qwrap.prepare(model, config)
model.load_state_dict(saved["model"])
optimizer, schedule = training(model)
optimizer.load_state_dict(saved["optimizer"])
schedule.load_state_dict(saved["schedule"])
train(STEPS - STOP)

# 4. Export, and hold the file against the simulation.
model.eval()
qwrap.export(model, "digits.int2.onnx")
report = qwrap.verify(model, "digits.int2.onnx", batches("validation")[:2])
print(report)
assert report.differing_codes <= 1e-3 * report.codes  # ties that float sums decide

session = onnxruntime.InferenceSession("digits.int2.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {"image": test_images.numpy()})
trained = accuracy(torch.from_numpy(logits))
print(f"accuracy in onnxruntime: {trained:.3f}; calibrated only: {calibrated:.3f}")
assert trained > calibrated + 0.1
