"""Train the digits network of ``qwrap demo`` and write ``qwrap/demo/digits.onnx``.

Needs nothing but the package and its embedded data; takes about one minute on two cores. Run
it where qwrap is installed: ``python scripts/train_demo.py``. The seed and the number of threads
are fixed, so the same versions on the same kind of CPU give the same file.
"""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwrap.demo import digits

TARGET = Path(__file__).resolve().parents[1] / "qwrap" / "demo" / "digits.onnx"
SEED = 0
EPOCHS = 10
BATCH = 100
PEAK_LR = 0.01
OPSET = 17


def conv(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1) -> list:
    """Return a convolution that keeps (or divides by ``stride``) the side, and its BatchNorm."""
    padding = kernel // 2
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Two convolutions beside an identity (He et al., arXiv:1512.03385)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv(channels, channels), nn.ReLU(), *conv(channels, channels))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(x + body(x))``."""
        return self.act(x + self.body(x))


class Digits(nn.Module):
    """Convolution, depthwise-separable and residual blocks, global average pool, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(1, 32), nn.ReLU(), *conv(32, 64, stride=2), nn.ReLU())
        self.separable = nn.Sequential(
            *conv(64, 64, groups=64), nn.ReLU6(), *conv(64, 64, kernel=1), nn.ReLU6()
        )
        self.residual = Residual(64)
        self.narrow = nn.Sequential(*conv(64, 96, stride=2), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(96, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, float32[N, 10], of images float32[N, 1, 28, 28] in 0 … 1."""
        x = self.narrow(self.residual(self.separable(self.stem(image))))
        return self.head(self.pool(x).flatten(1))


def shifted(images: Tensor) -> Tensor:
    """Return every image moved by up to two pixels each way, the border filled with black."""
    padded = F.pad(images, (2, 2, 2, 2))
    moves = torch.randint(0, 5, (len(images), 2)).tolist()
    return torch.stack([
        image[:, dy : dy + 28, dx : dx + 28] for image, (dy, dx) in zip(padded, moves, strict=True)
    ])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of ``images`` that ``model`` classifies as ``labels``."""
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(BATCH)])
    return (found == labels).double().mean().item()


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train ``model`` in place: AdamW, one cycle, cross-entropy."""
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, EPOCHS * steps)
    for epoch in range(EPOCHS):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d}  loss {total / steps:.4f}")


def export(model: nn.Module) -> None:
    """Write ``model`` as the embedded ONNX file, BatchNormalization kept."""
    torch.onnx.export(
        model.eval(),
        (torch.zeros(1, 1, 28, 28),),
        TARGET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=OPSET,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold BatchNormalization away
        do_constant_folding=False,
    )
    onnx.checker.check_model(TARGET, full_check=True)


def main() -> None:
    """Train, report the accuracy on the validation images and export."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model = Digits()
    train(model, *map(torch.from_numpy, digits("train")))
    reached = accuracy(model, *map(torch.from_numpy, digits("validation")))
    export(model)
    print(f"validation accuracy {reached:.4f} after {time.perf_counter() - start:.0f} s")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
