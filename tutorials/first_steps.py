"""From an ONNX file to a verified int8 file, one step at a time, on the embedded digits.

Run it in any folder: ``python tutorials/first_steps.py``. It leaves ``digits.int8.onnx`` there.
"""

import torch

import qwrap
from qwrap.demo import batches, digits, model_path

# 1. Wrap. The graph becomes a module tree with the file's names; it computes what onnxruntime does.
model = qwrap.load(model_path()).eval()
print(model)

# 2. Prepare. BatchNormalization is folded, and what is worth it gets quantization stubs.
plan = qwrap.prepare(model)
print(plan.summary())

# 3. Calibrate. Observers watch ordinary forwards; the model computes in float until this is done.
qwrap.calibrate(model, batches("calibration"))

# 4. Look. From here on the model simulates its int8 form: as it trains, and exactly as it deploys.
images, labels = (torch.from_numpy(array) for array in digits("validation"))
with torch.no_grad():
    training_form = model(images).argmax(1)
    with qwrap.exact(model):
        deployed_form = model(images).argmax(1)
print(f"accuracy, training form: {(training_form == labels).float().mean():.4f}")
print(f"accuracy, exact form:    {(deployed_form == labels).float().mean():.4f}")

# 5. Train, if accuracy was lost: any loop, any optimizer; gradients pass straight through stubs.
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
train_images, train_labels = (torch.from_numpy(array) for array in digits("calibration"))
for start in range(0, len(train_images), 50):
    part = slice(start, start + 50)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(train_images[part]), train_labels[part]).backward()
    optimizer.step()

# 6. Export, and hold the file against the simulation, tensor by tensor, code by code.
qwrap.export(model, "digits.int8.onnx")
report = qwrap.verify(model, "digits.int8.onnx", batches("validation")[:4])
print(report)
assert report.differing_codes == 0
