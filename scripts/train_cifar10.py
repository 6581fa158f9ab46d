"""Train the shared CIFAR-10 network with quantization: what is won back of what calibration loses.

    python scripts/train_cifar10.py --activation uint4 --weight int4 --first-last-8bit

For each seed and their mean: the accuracy on the test images of the float file, after calibration
alone and after training, in the form that is trained, as the exact simulation and in onnxruntime;
how many predictions of the last two differ; and how much of the loss was won back.

Needs the folders ``models`` and ``data`` that ``--shared`` or ``$QWRAP_SHARED`` names.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table
from shared_models import SharedModels, default_folder
from torch import Tensor
from torch.nn import functional as F

import qwrap

NAME = "resnet20_cifar10"
BATCH = 100
CALIBRATION = 512  # images
FLIP = 0.5
SHIFT = 4  # pixels


@dataclass(frozen=True, slots=True)
class Images:
    """Images ``[N, 3, 32, 32]`` as the network wants them, and classes ``[N]``."""

    x: Tensor
    y: Tensor

    def batches(self) -> Iterator[Tensor]:
        """Yield the images in order."""
        yield from self.x.split(BATCH)

    def accuracy(self, classify: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """Return the share of right classes in percent, and the classes."""
        with torch.no_grad():
            classes = torch.cat([classify(x).argmax(1) for x in self.batches()])
        return 100 * float((classes == self.y).float().mean()), classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        batch: images in a step.
        lr: of the weights at the start; it falls to 0 along half a cosine.
        scale_lr: the same of the scales.
        distill: share of the loss that is the divergence from the float network's classes.
    """

    epochs: int
    batch: int
    lr: float
    scale_lr: float
    distill: float


def train(model: qwrap.WrappedModel, teacher: torch.nn.Module, data: Images, how: Recipe) -> None:
    """Train ``model``, in place, with the plain loop that any module is trained with."""
    groups = qwrap.param_groups(model, lr=how.lr, weight_decay=1e-4, scale_lr=how.scale_lr)
    optimizer = torch.optim.AdamW(groups)
    steps = how.epochs * math.ceil(len(data.x) / how.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(how.epochs):
        for part in torch.randperm(len(data.x)).split(how.batch):
            images = augmented(data.x[part])
            with torch.no_grad():
                wanted = F.log_softmax(teacher(images), 1)
            logits = model(images)
            found = F.log_softmax(logits, 1)
            divergence = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
            by_label = F.cross_entropy(logits, data.y[part])
            optimizer.zero_grad()
            (how.distill * divergence + (1 - how.distill) * by_label).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def augmented(x: Tensor) -> Tensor:
    """Return images shifted by a few pixels, each one in its own way, half of them mirrored."""
    size = x.shape[-1]
    padded = F.pad(x, [SHIFT] * 4)
    at = torch.randint(0, 2 * SHIFT + 1, (2, len(x)))
    rows = at[0, :, None] + torch.arange(size)
    columns = at[1, :, None] + torch.arange(size)
    mirrored = torch.rand(len(x)) < FLIP
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(len(x))[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def in_onnxruntime(path: Path, *, fused: bool) -> Callable[[Tensor], Tensor]:
    """Return the file as a function."""
    options = onnxruntime.SessionOptions()
    if not fused:
        # onnxruntime builds integer kernels for types that it then has none for.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def run(
    path: Path, config: qwrap.QConfig, training: Images, test: Images, seed: int, how: Recipe
) -> dict[str, float]:
    """Return the figures of one seed."""
    torch.manual_seed(seed)
    teacher = qwrap.load(path, parameters=[])
    model = qwrap.load(path)
    plan = qwrap.prepare(model, config)
    qwrap.calibrate(model, training.x[:CALIBRATION].split(BATCH), progress=False)
    found = {"float": test.accuracy(teacher)[0], "calibrated": test.accuracy(model)[0]}
    start = time.perf_counter()
    train(model, teacher, training, how)
    found["minutes"] = (time.perf_counter() - start) / 60
    found["trained"] = test.accuracy(model)[0]
    with qwrap.exact(model):
        found["exact"], exact = test.accuracy(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        qwrap.export(model, file)
        found["onnxruntime"], deployed = test.accuracy(in_onnxruntime(file, fused=plan.fused))
    found["differ"] = float((exact != deployed).sum())
    lost = found["float"] - found["calibrated"]
    won = found["onnxruntime"] - found["calibrated"]
    found["won back"] = 100 * won / lost if lost > 0 else math.nan
    return found


def main(
    *,
    activation: str = "uint8",
    weight: str = "int8",
    first_last_8bit: bool = False,
    way: Annotated[str, typer.Option("--training", help="how scales move")] = "lsq",
    seeds: int = 3,
    epochs: int = 5,
    batch: int = 50,
    lr: float = 1e-4,
    scale_lr: float = 1e-3,
    distill: float = 1.0,
    threads: int = 1,
    shared: Path | None = None,
) -> None:
    """Train, export and compare."""
    torch.set_num_threads(threads)
    models = SharedModels(shared or default_folder())
    training, test = (
        Images(*map(torch.from_numpy, models.cifar10(split))) for split in ("train", "test")
    )
    console = Console()
    how = Recipe(epochs=epochs, batch=batch, lr=lr, scale_lr=scale_lr, distill=distill)
    found = []
    for seed in range(seeds):
        config = qwrap.QConfig(
            activation=activation, weight=weight, first_last_8bit=first_last_8bit, training=way
        )
        found.append(run(models.path(NAME), config, training, test, seed, how))
        console.print(f"seed {seed}: {found[-1]}", soft_wrap=True)
    table = Table("seed", *found[0])
    for seed, row in enumerate(found):
        table.add_row(str(seed), *[f"{value:.2f}" for value in row.values()])
    means = [statistics.mean(row[key] for row in found) for key in found[0]]
    table.add_row("mean", *[f"{value:.2f}" for value in means])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
