"""Batch-norm re-estimation after training: each channel gets its float mean and variance back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwrap.errors import ConfigError
from qwrap.model.operators import function_of_node
from qwrap.model.points import Program
from qwrap.model.wrapped import WrappedModel
from qwrap.numerics import along_axis, round_scale
from qwrap.quant.auto.held_out import float_model
from qwrap.quant.constants import deployed, fit_biases
from qwrap.quant.live import live_layers
from qwrap.quant.matrices import WeightMatrix, is_given, users, weight_matrices
from qwrap.quant.moments import Moments
from qwrap.quant.outcome import Outcome
from qwrap.quant.trial import Inputs, attempt, split

OPERATORS = ("Conv", "ConvTranspose", "Gemm")
CONSTANT = 1e-9  # of a channel's power: a smaller variance is rounding noise
LARGEST_GAIN = 4.0  # a channel that lost more than this has lost its signal, too


def restore_channels(
    model: WrappedModel, batches: Iterable[Any], *, progress: bool = True
) -> Outcome:
    """Give each channel of quantized layers the mean and variance that it has in float, in place.

    It is what re-estimating a batch normalization behind the layer would come to, with or without
    one in the source: gamma and beta of the float channel, folded into the scale of the weight's
    channel and the bias. Codes of weights stay as they are, so that it costs nothing at run time. A
    channel without variance, or one that shares its scale with others, gets its mean alone.

    Rounding weights coarsely takes variance away, and a shift of the mean alone then lets less
    through the activation behind: below 8 bits this often helps where ``correct_biases`` does not.

    Every layer is corrected behind already corrected ones, all of them in one pass: while a batch
    runs, each layer goes by what it has seen so far, this batch included. Half of the batches
    teach; the other half decide whether the change is kept. One batch does both.

    Args:
        model: calibrated.
        batches: as for ``calibrate``; some 30 samples do. They are held in memory.
        progress: show a bar on a terminal.

    Returns:
        Whether the change was kept, and what came of it.

    Raises:
        ConfigError: layers have live batch normalizations, whose statistics
            ``qwrap.train.reestimate_batch_norm`` re-estimates.
        InputError: there are no batches, or one does not fit.
        NotCalibratedError: the model is not calibrated.

    Source: Nagel et al., arXiv:2203.11086, section 4.1 (re-estimation after training); Sun et al.,
    "Hybrid 8-bit floating point training and inference", NeurIPS 2019 (without training).
    """
    live = [key for key, _ in live_layers(model)]
    if live:
        raise ConfigError(
            f"node {live[0]!r} and {len(live) - 1} more have a live batch normalization; call "
            "qwrap.train.reestimate_batch_norm(model, batches), which renews their statistics"
        )
    teaching, deciding = split(model, batches)

    @torch.no_grad()
    def restore() -> list[str]:
        layers, left_out = _layers(model)
        _learn(model, layers, teaching, progress=progress)
        seen = [layer for layer in layers.values() if layer.is_known]
        for layer in seen:
            layer.apply(model)
        fit_biases(model)
        moved = sum(layer.has_gain for layer in seen)
        lines = [f"mean and variance of {moved} layers, mean alone of {len(seen) - moved}"]
        if len(seen) < len(layers):
            lines.append(f"{len(layers) - len(seen)} layers did not run")
        return lines + left_out

    return attempt(model, "batch-norm re-estimation", deciding, restore)


class _Layer:
    """One layer: computes its output with the moments that it should have.

    Attributes:
        wanted: moments of each channel in the float model.
        seen: those of the quantized layer, before the correction.
        has_gain: whether the scale of each channel may move.
    """

    def __init__(
        self, function: Callable[..., Tensor], matrix: WeightMatrix, bias: str, *, has_gain: bool
    ) -> None:
        self._function, self._matrix, self._bias_name = function, matrix, bias
        groups, _, outputs = matrix.size
        self.wanted, self.seen = Moments(groups * outputs), Moments(groups * outputs)
        self.has_gain = has_gain

    def __call__(self, *inputs: Tensor) -> Tensor:
        output = self._function(*inputs)
        self._bias = inputs[2]
        self.seen.add(output)
        if not self.is_known:
            return output
        gain, shift = self._correction()
        gain, shift = (along_axis(x.to(output.dtype), 1, output.dim()) for x in (gain, shift))
        return output * gain + shift

    @property
    def is_known(self) -> bool:
        """Whether the layer ran in both models: a branch may be taken in one alone."""
        return self.seen.count > 0 and self.wanted.count > 0

    def _correction(self) -> tuple[Tensor, Tensor]:
        """Return what to multiply the channels by and what to add then, float64 ``[C]`` each."""
        gain = torch.ones_like(self.seen.mean)
        if self.has_gain:
            varies = _varies(self.wanted) & _varies(self.seen)
            ratio = torch.where(varies, self.wanted.variance, 1.0)
            ratio = (ratio / torch.where(varies, self.seen.variance, 1.0)).sqrt()
            gain = ratio.clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
        return gain, self.wanted.mean - gain * self.seen.mean

    def apply(self, model: WrappedModel) -> None:
        """Write the correction into the weight, its scale, and the bias, in place."""
        gain, shift = self._correction()
        if self.has_gain:
            self._multiply(model, gain)
        bias = gain * self._bias.double() + shift
        model.assign(self._bias_name, bias.to(self._bias.dtype))

    def _multiply(self, model: WrappedModel, gain: Tensor) -> None:
        """Multiply scales, and the weight so that its codes stay, in place."""
        matrix, stub = self._matrix, self._matrix.stub
        index = matrix.scale_index()
        weight = deployed(model, matrix.value)
        levels = stub(weight) / _by_element(matrix, stub.scale, index)
        before = stub.scale.flatten()
        after = round_scale(before * gain[_channel_of_scale(matrix, index)], stub.spec)
        after = after.to(torch.float32)
        stub.set_qparams(replace(stub.qparams, scale=after.reshape(stub.scale.shape)))
        moved = weight * _by_element(matrix, after / before, index)
        step = _by_element(matrix, after, index)
        # Where a tie went to the other side, the weight becomes what its code stands for.
        kept = torch.isclose(stub(moved) / step, levels, rtol=1e-3, atol=1e-3)
        model.assign(matrix.value, torch.where(kept, moved, levels * step).to(weight.dtype))


def _varies(moments: Moments) -> Tensor:
    power = moments.variance + moments.mean.square()
    return moments.variance > CONSTANT * power


def _by_element(matrix: WeightMatrix, scale: Tensor, index: Tensor) -> Tensor:
    """Return the value of ``scale`` for each element of a weight, in its shape."""
    return matrix.stored(scale.flatten()[index])


def _channel_of_scale(matrix: WeightMatrix, index: Tensor) -> Tensor:
    """Return the output channel of each scale; one of them, where there are several."""
    groups, _, outputs = matrix.size
    channels = torch.arange(groups * outputs, device=index.device).reshape(groups, 1, outputs)
    owner = torch.empty(matrix.stub.scale.numel(), dtype=torch.long, device=index.device)
    return owner.scatter_(0, index.flatten(), channels.expand(index.shape).flatten())


def _layers(model: WrappedModel) -> tuple[dict[str, _Layer], list[str]]:
    """Return the layers by node key, and a line on those without a bias to correct."""
    layers, without = {}, 0
    for matrix in weight_matrices(model)[0]:
        if matrix.node.op_type not in OPERATORS:
            continue
        key = matrix.use[0]
        function = function_of_node(model, key)
        if matrix.bias is None or function is None:
            without += 1
            continue
        layers[key] = _Layer(function, matrix, matrix.bias, has_gain=_has_gain(model, matrix))
    lines = [f"{without} layers have no bias of their own and were left alone"] if without else []
    return layers, lines


def _has_gain(model: WrappedModel, matrix: WeightMatrix) -> bool:
    """Return whether each output channel has scales, and a weight, of its own to multiply."""
    spec, index = matrix.stub.spec, matrix.scale_index()
    groups, _, outputs = matrix.size
    channels = torch.arange(groups * outputs, device=index.device).reshape(groups, 1, outputs)
    owner = _channel_of_scale(matrix, index)
    free = spec.scale_type in ("float32", "float16", "bfloat16") and not spec.power_of_two
    own = bool((owner[index] == channels).all())
    linear = spec.dtype.function is None and not is_given(model, matrix.use)
    return free and own and linear and users(model, matrix) == (1, 1)


def _learn(
    model: WrappedModel, layers: Mapping[str, _Layer], batches: Sequence[Inputs], *, progress: bool
) -> None:
    graph, teacher, taps = model.graph, float_model(model), model.program.taps
    watchers = {graph.key(graph.nodes[key].outputs[0]): la.wanted.add for key, la in layers.items()}
    off = None if progress else True  # None: where there is no terminal
    for inputs in tqdm(batches, desc="channel moments", unit="batch", disable=off):
        with teacher.watching(watchers):
            teacher(**inputs)
        with model.running(Program(taps=taps, kernels=layers)):
            model(**inputs)
