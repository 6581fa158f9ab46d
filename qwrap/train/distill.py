"""Distillation: the float model that was quantized teaches the quantized one, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwrap.errors import ConfigError, InputError
from qwrap.model.batches import to_inputs
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.prepare import plan_of
from qwrap.train.joints import joints
from qwrap.train.losses import normalized_error
from qwrap.train.targets import Measure, are_floats, targets_of


def teacher_of(model: WrappedModel) -> WrappedModel:
    """Return the float model that was prepared, for comparison: frozen, in ``eval``.

    It has the weights that ``model`` had when ``prepare`` ran, whatever training did to them
    since, and none of its taps. Weights in files are mapped, so that both models share them until
    one is trained; others are copied.

    Args:
        model: prepared; of one loaded from a quantized file it is what that file says, dequantized.

    Raises:
        ConfigError: the model is not prepared.
    """
    plan_of(model)
    return float_model(model).requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Losses:
    """How far one batch of the student is from the teacher's.

    Attributes:
        total: what to call ``backward`` on: the mean of ``outputs`` plus ``block_weight`` times
            the mean of ``blocks``, float32 ``[]``.
        outputs: graph output -> its part.
        blocks: inner tensor -> its part; empty where ``block_weight`` is 0.
        results: what the student returned.
    """

    total: Tensor
    outputs: dict[str, Tensor]
    blocks: dict[str, Tensor]
    results: Any = field(repr=False)


class Distillation:
    """Compares a quantized model with its float teacher on batches without labels.

    In a loop of one's own::

        with qwrap.Distillation(model) as distillation:
            for batch in batches:
                optimizer.zero_grad()
                distillation(batch).total.backward()
                optimizer.step()

    Where the model runs inside of another module (a head, ``DistributedDataParallel``), or a loss
    on labels is added, run that module, then ask for the loss of what the model just did::

        loss = task_loss(module(x), labels) + distillation.loss().total

    Inside the ``with`` block the model is watched; a call outside of it watches for itself, which
    writes the model's code twice.

    Args:
        model: prepared and calibrated; it is the student.
        outputs: how outputs are compared. ``"mse"``: ``normalized_error``; ``"kl"``: ``divergence``
            over the last axis, over axis 1 of tensors with four axes or more, and of what a
            Softmax or LogSoftmax puts out over the logits before it; ``"cosine"``:
            ``cosine_distance``; or a function of both tensors. A mapping says it by output, and
            leaves out the others. Outputs that are no float tensors are never compared.
        blocks: inner tensors to compare, by ``normalized_error``: names in the graph, or "auto"
            for those of ``joints``. None: none.
        block_weight: weight of the inner tensors beside the outputs; may be set at any time.
        mask: graph input ``[N, L]`` that is 0 where tensors ``[N, L, ...]`` are padding, which does
            not count. None, or an input that the graph lacks: everything counts.
        teacher: called with the graph inputs in order, returns the outputs in order; None for
            ``teacher_of(model)``. Inner tensors need a ``WrappedModel`` that has them too.

    Attributes:
        model: the student.
        teacher: what it is compared with.
        blocks: the inner tensors compared.
        block_weight: see above.

    Raises:
        ConfigError: the model is not prepared, or has no such outputs or inner tensors.

    Source: Hinton et al., arXiv:1503.02531; inner tensors: Romero et al., arXiv:1412.6550.
    """

    def __init__(
        self,
        model: WrappedModel,
        *,
        outputs: Measure | Mapping[str, Measure] = "mse",
        blocks: Literal["auto"] | Sequence[str] | None = "auto",
        block_weight: float = 1.0,
        mask: str | None = "attention_mask",
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.teacher = teacher_of(model) if teacher is None else teacher
        self.block_weight = block_weight
        self._mask = mask
        self._outputs = targets_of(model.graph, outputs)
        self.blocks = _blocks(model, self.teacher, blocks)
        logits = [t.watched for t in self._outputs if t.watched is not None]
        watched = [*self.blocks, *logits] if isinstance(self.teacher, WrappedModel) else []
        self._student, self._wanted = _Recorder(watched), _Recorder(watched)
        self._forward: tuple[dict[str, Any], Any] | None = None
        self._opened: ExitStack | None = None

    def __enter__(self) -> Distillation:
        """Watch the model and its teacher."""
        if self._opened is not None:
            raise ConfigError("this Distillation is in use already; make another one")
        with ExitStack() as stack:
            stack.enter_context(self.model.watching(self._student.watchers))
            if isinstance(self.teacher, WrappedModel):
                stack.enter_context(self.teacher.watching(self._wanted.watchers))
            handle = self.model.register_forward_hook(self._note, with_kwargs=True)
            stack.callback(handle.remove)
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        """Leave the model and its teacher alone."""
        assert self._opened is not None
        opened, self._opened, self._forward = self._opened, None, None
        self._student.seen, self._wanted.seen = {}, {}
        opened.close()

    def __call__(self, batch: Any) -> Losses:
        """Run student and teacher on a batch and compare them.

        Args:
            batch: as for ``calibrate``.

        Raises:
            InputError: the batch does not fit the graph inputs, or nothing in it can be compared.
        """
        if self._opened is None:
            with self:
                return self(batch)
        self.model(**to_inputs(batch, self.model))
        return self.loss()

    def loss(self) -> Losses:
        """Run the teacher on what the model computed last, and compare.

        Each forward is compared once.

        Raises:
            ConfigError: the model has not run in the ``with`` block since the last comparison.
            InputError: nothing in the batch can be compared.
        """
        if self._forward is None:
            raise ConfigError(
                "the model has not run yet; in `with distillation:` run it, or a module that "
                "holds it, before each loss()"
            )
        (inputs, results), self._forward = self._forward, None
        student, self._student.seen = self._student.seen, {}
        wanted = self._taught(inputs)
        teacher, self._wanted.seen = self._wanted.seen, {}
        mask = _mask(inputs, self._mask)
        given = list(results) if isinstance(results, tuple) else [results]
        outputs = self._compare_outputs(given, wanted, student, teacher, mask)
        blocks: dict[str, Tensor] = {}
        if self.block_weight:
            for key in self.blocks:
                if key in student and are_floats(student[key], teacher.get(key)):
                    fitting = self._fitting(key, student[key], mask)
                    blocks[key] = normalized_error(student[key], teacher[key], fitting)
        if not outputs and not blocks:
            raise InputError("no output is a float tensor, so there is nothing to compare")
        total = _mean(outputs) + self.block_weight * _mean(blocks)
        assert isinstance(total, Tensor)
        return Losses(total, outputs, blocks, results)

    def _note(
        self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        inputs = dict(zip(self.model.input_names, args, strict=False)) | kwargs
        self._forward = inputs, result

    @torch.no_grad()
    def _taught(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the teacher's outputs, in float32 even under autocast.

        Its rounding would be as large as that of 8 bits.
        """
        ordered = [inputs[name] for name in self.model.input_names]
        device = next((x.device.type for x in ordered if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            results = self.teacher(*ordered)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        count = len(self.model.output_names)
        if len(results) != count:
            raise ConfigError(f"the teacher returns {len(results)} outputs; the graph has {count}")
        return results

    def _compare_outputs(
        self,
        results: Sequence[Any],
        wanted: Sequence[Any],
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> dict[str, Tensor]:
        found = {}
        for target in self._outputs:
            x, y = results[target.index], wanted[target.index]
            if target.watched is not None and target.watched in student:
                x, y = student[target.watched], teacher[target.watched]
            if are_floats(x, y):
                found[target.name] = target.compare(x, y, self._fitting(target.name, x, mask))
        return found

    def _fitting(self, key: str, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask if it says which part of ``x`` is padding.

        Where the graph tells a fixed size from a symbol, equal numbers may be chance.
        """
        if mask is None or x.dim() not in (2, 3) or x.shape[:2] != mask.shape:
            return None
        graph = self.model.graph
        shape, given = (
            graph.types[k].shape if k in graph.types else None for k in (key, self._mask)
        )
        is_fixed = shape is not None and len(shape) > 1 and isinstance(shape[1], int)
        return None if is_fixed and given is not None and not isinstance(given[1], int) else mask


class _Recorder:
    """Holds on to the tensors that a model computes.

    Attributes:
        watchers: for ``WrappedModel.watching``.
        seen: value -> its tensor in the last forward.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.watchers = {key: partial(self._note, key) for key in keys}
        self.seen: dict[str, Tensor] = {}

    def _note(self, key: str, x: Tensor) -> None:
        self.seen[key] = x


def _blocks(
    model: WrappedModel, teacher: nn.Module, asked: Literal["auto"] | Sequence[str] | None
) -> list[str]:
    """Return the inner tensors to compare."""
    known = teacher.graph.values if isinstance(teacher, WrappedModel) else {}
    if asked == "auto":
        return [key for key in joints(model.layout) if key in known]
    if isinstance(asked, str):
        raise ConfigError(f'blocks={asked!r}: expected "auto" or a list of tensor names')
    asked = list(asked or ())
    main = {
        model.graph.key(v) for node in model.layout.region.nodes() for v in node.outputs if v.name
    }
    if unknown := [key for key in asked if key not in main]:
        raise ConfigError(
            f"blocks={unknown}: no such tensors are computed in the main graph of the prepared "
            "model; see model.graph.values for their names"
        )
    if missing := [key for key in asked if key not in known]:
        raise ConfigError(f"blocks={missing}: the teacher computes no tensors of these names")
    return asked


def _mask(inputs: Mapping[str, Any], name: str | None) -> Tensor | None:
    """Return which positions count, bool ``[N, L]``."""
    given = None if name is None else inputs.get(name)
    return given != 0 if isinstance(given, Tensor) and given.dim() == 2 else None


def _mean(parts: Mapping[str, Tensor]) -> Tensor | float:
    return torch.stack(list(parts.values())).mean() if parts else 0.0
