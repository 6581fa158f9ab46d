"""Quantization-aware training with accelerate: bf16 autocast and accumulated gradients.

Run it in any folder, with ``python tutorials/qat_accelerate.py`` or ``accelerate launch``. It
leaves the folder ``checkpoint`` and ``digits.int2.onnx`` there.
"""

import onnxruntime
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import qwrap
from qwrap.demo import batches, digits, model_path

STEPS = 30  # of the optimizer, of two batches each
test_images, test_labels = (torch.from_numpy(array[:500]) for array in digits("validation"))
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
set_seed(0)


def accuracy(logits: torch.Tensor) -> float:
    """Return the share of the test images that have the largest logit at their label."""
    return (logits.argmax(1) == test_labels).float().mean().item()


# 1. Prepare and calibrate on the device, before accelerate wraps the model. Of several processes
#    each may give its share of the calibration data: all get the scales of all of it.
model = qwrap.load(model_path())
qwrap.prepare(model, qwrap.QConfig(weight="int2", first_last_8bit=True, scope="kernels"))
model.to(accelerator.device)
qwrap.calibrate(model, batches("calibration")[:4])
with torch.no_grad():
    calibrated = accuracy(model.eval()(test_images.to(accelerator.device)).cpu())

# 2. Train. Under autocast what is multiplied is bf16; scales and codes stay float32. Weights are
#    rounded once for both batches of a step.
optimizer = torch.optim.AdamW(
    qwrap.param_groups(model.train(), lr=2e-3, weight_decay=1e-4, scale_lr=1e-2)
)
data = TensorDataset(*(torch.from_numpy(array) for array in digits("train")))
loader = DataLoader(data, batch_size=16, shuffle=True)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
schedule = qwrap.train.Schedule(wrapped, STEPS, learn_scales=0.1)
for images, labels in loader:
    with accelerator.accumulate(wrapped):
        loss = torch.nn.functional.cross_entropy(wrapped(images), labels)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        schedule.step()
    if schedule.taken == STEPS:
        break
accelerator.save_state("checkpoint")
accelerator.load_state("checkpoint")  # into a model that was prepared with the same settings

# 3. Export from the main process what is inside the wrappers.
trained_model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).cpu().eval()
if accelerator.is_main_process:
    qwrap.export(trained_model, "digits.int2.onnx")
    report = qwrap.verify(trained_model, "digits.int2.onnx", batches("validation")[:2])
    assert report.differing_codes <= 1e-3 * report.codes  # ties that float sums decide

    session = onnxruntime.InferenceSession("digits.int2.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": test_images.numpy()})
    trained = accuracy(torch.from_numpy(logits))
    print(f"accuracy in onnxruntime: {trained:.3f}; calibrated only: {calibrated:.3f}")
    assert trained > calibrated + 0.1
accelerator.end_training()
