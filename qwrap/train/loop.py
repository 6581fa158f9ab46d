"""Steps of an optimizer towards a teacher, with looks at what was held out."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from qwrap.errors import TrainingError
from qwrap.quant.prepare import device_of
from qwrap.train.best import Kept
from qwrap.train.distill import Distillation, Losses
from qwrap.train.ranks import Ranks
from qwrap.train.report import FinetuneReport, Record
from qwrap.train.split import Inputs, Split, rows_of


class Loop:
    """One training, from the first look at what was held out to the last.

    Args:
        distillation: of the model to train; in use.
        data: what to train on, and what to hold out.
        optimizer: of the model's parameters, with their learning rates at the start.
        total: steps to do.
        factor: part done -> what learning rates are multiplied with.
        accumulate: batches in a step.
        autocast: type to compute in where ``torch.autocast`` may, None for none.
        interval: steps between two looks.
        patience: looks without a better state until training ends, None for no end.
        ranks: who trains along.
    """

    def __init__(
        self,
        distillation: Distillation,
        data: Split,
        optimizer: Optimizer,
        *,
        total: int,
        factor: Callable[[float], float],
        accumulate: int,
        autocast: torch.dtype | None,
        interval: int,
        patience: int | None,
        ranks: Ranks,
    ) -> None:
        self._distillation, self._data, self._optimizer = distillation, data, optimizer
        self._model, self._device = distillation.model, device_of(distillation.model)
        self._total, self._factor, self._accumulate = total, factor, accumulate
        self._autocast, self._interval, self._patience = autocast, interval, patience
        self._ranks = ranks
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._weight = distillation.block_weight
        needs_scaling = autocast is torch.float16
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=needs_scaling)
        self._report = FinetuneReport(batches=data.count)
        self._trained: list[tuple[float, float]] = []  # total and outputs since the last look

    def run(self, *, progress: bool) -> FinetuneReport:
        """Train; the model has the best state so far at the end, whatever ends it."""
        start = time.monotonic()
        self._ranks.spread(self._model)
        best = Kept(self._model)
        off = None if progress and self._ranks.is_first else True  # None: where no terminal is
        bar = tqdm(total=self._total, desc="fine-tuning", unit="step", disable=off)
        try:
            self._steps(best, bar)
        finally:
            bar.close()
            best.restore(self._model)
            self._optimizer.zero_grad()
            self._distillation.block_weight = self._weight
        self._report.seconds = time.monotonic() - start
        return self._report

    def _steps(self, best: Kept, bar: tqdm[None]) -> None:
        data = self._batches()
        self._look(0, best)
        done = 0
        while done < self._total:
            batches = list(itertools.islice(data, self._accumulate))
            (count,) = self._ranks.least(len(batches))  # all ranks run as many
            if not count:
                self._report.end = "data"
                break
            batches = batches[: int(count)]
            self._go_to(done / self._total)
            total, outputs = self._step(done + 1, batches)
            done += 1
            self._trained.append((total, outputs))
            bar.update()
            bar.set_postfix(loss=f"{outputs:.3g}", held_out=f"{self._report.lowest:.3g}")
            if done % self._interval == 0 and done < self._total:
                self._look(done, best)
                if self._is_out_of_patience():
                    self._report.end = "patience"
                    break
        if self._report.history[-1].step < done:
            self._look(done, best)

    def _batches(self) -> Iterator[Inputs]:
        for epoch in itertools.count():
            yield from self._data.epoch(epoch)
            if self._data.is_once:
                return

    def _go_to(self, done: float) -> None:
        """Set learning rates and the weight of inner tensors for the next step."""
        self._distillation.block_weight = self._weight * (1 - done)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(done)

    def _step(self, number: int, batches: list[Inputs]) -> tuple[float, float]:
        """Do one step of the optimizer; return the loss, and that of the outputs alone."""
        self._model.train()
        self._optimizer.zero_grad()
        sums = torch.zeros(2, device=self._device)
        for inputs in batches:
            with self._casting():
                self._model(**inputs)
            losses = self._distillation.loss()
            self._scaler.scale(losses.total / len(batches)).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([losses.total.detach(), _of_outputs(losses)])
        count = self._ranks.total(*(sums / len(batches)).tolist(), 1.0)
        total, outputs = count[0] / count[2], count[1] / count[2]
        if not math.isfinite(total):
            raise TrainingError(
                f"step {number}: the loss is {total}; the model has the best state from before. "
                "Try a lower learning rate, or no autocast"
            )
        self._ranks.average(p for group in self._optimizer.param_groups for p in group["params"])
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return total, outputs

    def _casting(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast)

    @torch.no_grad()
    def _look(self, step: int, best: Kept) -> None:
        """Measure what was held out, and keep the state if it is the best."""
        self._model.eval()
        self._distillation.block_weight = 0
        total = rows = 0.0
        batches = 0
        for inputs in self._data.held_out():
            self._model(**inputs)
            size = rows_of(inputs)
            total += size * _of_outputs(self._distillation.loss()).item()
            rows += size
            batches += 1
        total, rows = self._ranks.total(total, rows)
        held_out = total / rows if rows else math.nan
        if rows and not math.isfinite(held_out):
            raise TrainingError(
                f"step {step}: the loss of what was held out is {held_out}; the model has the "
                "best state from before"
            )
        self._report.held_out_batches = batches
        self._record(step, held_out)
        if step and not held_out >= self._report.lowest:
            best.take(self._model)
            self._report.best_step, self._report.lowest = step, held_out

    def _record(self, step: int, held_out: float) -> None:
        if step == 0:
            self._report.lowest = held_out
        parts = list(zip(*self._trained, strict=True)) or [(math.nan,), (math.nan,)]
        loss, outputs = (sum(part) / len(part) for part in parts)
        self._trained = []
        lr = self._optimizer.param_groups[0]["lr"]
        self._report.history.append(Record(step, loss, outputs, held_out, lr))

    def _is_out_of_patience(self) -> bool:
        history, best = self._report.history, self._report.best_step
        since = sum(record.step > best for record in history)
        return self._patience is not None and since >= self._patience


def _of_outputs(losses: Losses) -> torch.Tensor:
    return torch.stack([*losses.outputs.values()]).detach().mean()
