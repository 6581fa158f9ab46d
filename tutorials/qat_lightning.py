"""Quantization-aware training with Lightning.

Run it in any folder: ``python tutorials/qat_lightning.py``. It leaves ``digits.ckpt`` and
``digits.int2.onnx`` there.
"""

import lightning
import onnxruntime
import torch
from torch.utils.data import DataLoader, TensorDataset

import qwrap
from qwrap.demo import batches, digits, model_path

STEPS = 30
train_images, train_labels = (torch.from_numpy(array) for array in digits("train"))
test_images, test_labels = (torch.from_numpy(array[:500]) for array in digits("validation"))


def prepared() -> qwrap.WrappedModel:
    """Return the model with 2-bit weights, those next to input and output in 8 bits."""
    model = qwrap.load(model_path())
    qwrap.prepare(model, qwrap.QConfig(weight="int2", first_last_8bit=True, scope="kernels"))
    return model


def accuracy(logits: torch.Tensor) -> float:
    """Return the share of the test images that have the largest logit at their label."""
    return (logits.argmax(1) == test_labels).float().mean().item()


class Digits(lightning.LightningModule):
    """The prepared model, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = prepared()
        self.schedule: qwrap.train.Schedule | None = None

    def on_train_start(self) -> None:
        """Let the schedule bring the stubs to where the first step has them."""
        self.schedule = qwrap.train.Schedule(self.model, STEPS, learn_scales=0.1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Return the loss, and log what quantization does."""
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Count the step."""
        assert self.schedule is not None
        self.schedule.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; ``param_groups`` finds the stubs wherever they are in this module."""
        groups = qwrap.param_groups(self, lr=2e-3, weight_decay=1e-4, scale_lr=1e-2)
        return torch.optim.AdamW(groups)


# 1. Calibrate before the Trainer starts: scales have to be known when training begins.
torch.manual_seed(0)
digits_module = Digits()
qwrap.calibrate(digits_module.model, batches("calibration")[:4])
with torch.no_grad():
    calibrated = accuracy(digits_module.model.eval()(test_images))
digits_module.train()

# 2. Fit. Precision, accumulation, clipping and devices are the Trainer's, as for any module.
loader = DataLoader(TensorDataset(train_images, train_labels), batch_size=32, shuffle=True)
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    devices=1,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
trainer.fit(digits_module, loader)

# 3. A checkpoint holds all: it fits a module that was prepared with the same settings.
trainer.save_checkpoint("digits.ckpt")
restored = Digits.load_from_checkpoint("digits.ckpt", weights_only=True).model.eval()
with torch.no_grad():
    assert torch.equal(restored(test_images), digits_module.model.eval()(test_images))

# 4. Export what is inside the LightningModule.
qwrap.export(restored, "digits.int2.onnx")
report = qwrap.verify(restored, "digits.int2.onnx", batches("validation")[:2])
assert report.differing_codes <= 1e-3 * report.codes  # ties that float sums decide

session = onnxruntime.InferenceSession("digits.int2.onnx", providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {"image": test_images.numpy()})
trained = accuracy(torch.from_numpy(logits))
print(f"accuracy in onnxruntime: {trained:.3f}; calibrated only: {calibrated:.3f}")
assert trained > calibrated + 0.1
