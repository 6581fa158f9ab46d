"""Win accuracy back after calibration: one call, single algorithms in any order, and the guard.

Run it in any folder: ``python tutorials/accuracy.py``. It leaves ``digits.int3.onnx`` there.
"""

import torch

import qwrap
from qwrap import algorithms
from qwrap.demo import batches, digits, model_path

images = torch.from_numpy(digits("validation")[0][:250])
samples = batches("calibration")[:12]
with torch.no_grad():
    wanted = qwrap.load(model_path()).eval()(images)


def calibrated(weight: str) -> qwrap.WrappedModel:
    """Return the digits' network with weights of a type, calibrated and nothing else."""
    model = qwrap.load(model_path()).eval()
    qwrap.prepare(model, qwrap.QConfig(weight=weight))
    qwrap.calibrate(model, samples, progress=False)
    return model


def show(what: str, model: qwrap.WrappedModel) -> None:
    """Print how far outputs are from the float ones, for images that nothing has learned from."""
    with torch.no_grad():
        noise = (model(images) - wanted).square().sum() / wanted.square().sum()
    print(f"{what:32s} {-10 * noise.log10():5.1f} dB")


# 1. One call. Every step has to bring held-back samples closer to the float outputs.
model = calibrated("int3")
show("3 bits, calibrated", model)
qwrap.improve(model, samples, progress=False)
show("3 bits, default effort", model)
print(model.plan.summary())
qwrap.export(model, "digits.int3.onnx")

# 2. Single algorithms. They compose in any order; each says what came of it.
for weight in ("int3", "int4"):
    model = calibrated(weight)
    for outcome in (
        algorithms.equalize(model, samples, progress=False),
        algorithms.round_weights(model, samples, progress=False),
        algorithms.brecq(model, samples, iterations=60, drop=0.5, progress=False),
        algorithms.correct_biases(model, samples),
    ):
        print("kept  " if outcome else "undone", outcome.line())
    show(f"{weight}, learned by block", model)

# 3. The guard: the fewest layers back to float for what the outputs need.
model = calibrated("int2")
show("2 bits, calibrated", model)
print(qwrap.guard(model, samples, min_sqnr=12.0, progress=False).line())
show("2 bits, guarded", model)
