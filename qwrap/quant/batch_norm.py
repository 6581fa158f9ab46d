"""A layer together with the batch normalization behind it, while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwrap.errors import InputError
from qwrap.graph.fold import Normalization
from qwrap.learned import keep_in_graph
from qwrap.model.substitute import Substitute, Tap
from qwrap.quant.follow import is_repeated
from qwrap.quant.moments import Moments, normalized_over_ranks
from qwrap.quant.observe.sync import is_distributed
from qwrap.quant.stubs import Switch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # missing where torch was built without

WEIGHT, BIAS = 1, 2


@dataclass(frozen=True, slots=True)
class Channels:
    """How the output channels of a layer lie in its weight.

    Attributes:
        axis: that they run along, inside of a group.
        groups: of a ConvTranspose, whose other axis runs through all groups; else 1.
    """

    axis: int
    groups: int = 1

    def along(self, vector: Tensor, weight: Tensor) -> Tensor:
        """Return one value for each channel in a shape that broadcasts against ``weight``."""
        rest = (1,) * (weight.dim() - 2)
        if self.groups == 1:
            ends = (-1, 1) if self.axis == 0 else (1, -1)
            return vector.reshape(*ends, *rest)
        inputs = weight.shape[0] // self.groups
        rows = vector.reshape(self.groups, -1).repeat_interleave(inputs, 0)
        return rows.reshape(*rows.shape, *rest)


class LiveBatchNorm(Substitute):
    """Computes a layer and its batch normalization; what is quantized is the folded weight.

    The stored weight is the one before folding, ``W``, and the stored bias is the shift ``beta``.
    With ``f = gamma / sqrt(running_var + eps)``, the graph means ``W * f`` and
    ``beta - running_mean * f``, computed in float64 and rounded once, as ``prepare`` folds.

    In training the layer is ``BN(layer(x, Q(W * f) / f))``: ``Q`` rounds what will be deployed, and
    its scaling by ``f`` is undone before the batch is normalized by its own statistics. The
    gradient of gamma is that of batch normalization; it passes through no rounding. In evaluation,
    or once the statistics are frozen, the layer is what is deployed, biases rounded as well.

    Attributes:
        channels: where the output channels are.
        eps: added to variances.
        momentum: weight of a batch in the running statistics, as in ``torch.nn.BatchNorm2d``.
        frozen: whether training goes by the running statistics and leaves them alone.
        known: whether there are statistics. Until then the layer is as it was folded.
        moments: adds up what passes, None if nobody asked for it.
        renewing: whether the moments are to become the statistics: then batches are normalized by
            their own, whatever the mode.
        synced: whether the ranks of torch.distributed share the statistics of a batch.
        group: these ranks, all if None.

    Source: Jacob et al., arXiv:1712.05877, section 3.2; Krishnamoorthi, arXiv:1806.08342, section
    3.2.2.
    """

    indices = (WEIGHT, BIAS)
    gamma: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, name: str, channels: Channels, count: int, *, is_trained: bool = True
    ) -> None:
        super().__init__()
        self.name, self.channels, self.eps, self.momentum = name, channels, 1e-5, 0.1
        self.frozen, self.known, self.renewing = False, False, False
        self.moments: Moments | None = None
        self.group: ProcessGroup | None = None
        self.synced = False
        if is_trained:
            self.gamma = nn.Parameter(torch.ones(count))
        else:
            self.register_buffer("gamma", torch.ones(count))
        self.register_buffer("running_mean", torch.zeros(count))
        self.register_buffer("running_var", torch.ones(count))
        self._last: Tensor | None = None

    # --- folding ---------------------------------------------------------------------------------

    def factor(self) -> Tensor:
        """Return what each channel of the weight is multiplied by, float64 ``[C]``."""
        return self.gamma.double() / (self.running_var.double() + self.eps).sqrt()

    def made(self, index: int, stored: Tensor) -> Tensor:
        """Return the folded weight or bias."""
        if not self.known:
            return stored
        factor = self.factor()
        if index == WEIGHT:
            return (stored * self.channels.along(factor, stored)).to(stored.dtype)
        return (stored.double() - self.running_mean.double() * factor).to(stored.dtype)

    def unmade(self, index: int, wanted: Tensor) -> Tensor:
        """Return the weight or shift that folds to ``wanted``; where gamma is 0, a weight of 0."""
        if not self.known:
            return wanted
        factor = self.factor()
        if index == WEIGHT:
            parts = self.channels.along(factor, wanted)
            return torch.where(parts == 0, 0, wanted / parts).to(wanted.dtype)
        return (wanted.double() + self.running_mean.double() * factor).to(wanted.dtype)

    # --- running ---------------------------------------------------------------------------------

    def forward(
        self,
        function: Callable[..., Any],
        taps: Sequence[Tap | None],
        *inputs: Any,
        **keywords: Any,
    ) -> Any:
        """Compute the layer as deployed, or with the statistics of the batch."""
        x, weight, beta = inputs
        weight_tap, bias_tap = taps
        if self.known and (self.renewing or (self.training and not self.frozen)):
            return self._by_batch(lambda w: function(x, w, None, **keywords), weight_tap, *inputs)
        folded, bias = self.made(WEIGHT, weight), self.made(BIAS, beta)
        folded = folded if weight_tap is None else weight_tap(folded)
        y = function(x, folded, bias if bias_tap is None else bias_tap(bias), **keywords)
        if self.moments is not None:
            self.moments.add(y.detach(), -bias.detach())
        if not self.known and self.training and torch.is_grad_enabled():
            return keep_in_graph(y, [*self.parameters()])
        return y

    def _by_batch(
        self,
        layer: Callable[[Tensor], Tensor],
        tap: Tap | None,
        _x: Tensor,
        weight: Tensor,
        beta: Tensor,
    ) -> Tensor:
        is_again = is_repeated()
        y = layer(self._rounded(tap, weight, is_again))
        if y.numel() <= y.shape[1] and not self._is_over_ranks:
            raise InputError(
                f"node {self.name!r}: its output of shape {list(y.shape)} has one value for each "
                "channel, which has no variance; give larger batches, or call "
                "qwrap.train.freeze_batch_norm(model)"
            )
        if self.moments is not None and not is_again:
            self.moments.add(y.detach())
        mean, variance = self.running_mean, self.running_var
        if is_again or self.renewing:
            mean, variance = mean.clone(), variance.clone()  # the ones of the layer stay
        if self._is_over_ranks:
            y, batch_mean, batch_variance = normalized_over_ranks(y, self.eps, self.group)
            with torch.no_grad():
                mean.lerp_(batch_mean.to(mean.dtype), self.momentum)
                variance.lerp_(batch_variance.to(variance.dtype), self.momentum)
            shape = (1, -1, *[1] * (y.dim() - 2))
            return y * self.gamma.reshape(shape).to(y.dtype) + beta.reshape(shape).to(y.dtype)
        return F.batch_norm(
            y,
            mean,
            variance,
            self.gamma,
            beta.to(self.gamma.dtype),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )

    @property
    def _is_over_ranks(self) -> bool:
        return self.synced and is_distributed(self.group) and self.training and not self.renewing

    def _rounded(self, tap: Tap | None, weight: Tensor, is_again: bool) -> Tensor:
        """Return the weight with the rounding error that the folded one has.

        Where gamma is 0 the weight has no say in what is deployed, nor any rounding error.
        """
        if tap is None or (isinstance(tap, Switch) and tap.mode != "quantize"):
            return weight if tap is None else tap(weight)
        factor = self._last if is_again else None
        if factor is None:
            with torch.no_grad():
                factor = self._last = self.factor().to(weight.dtype)
        parts = self.channels.along(factor, weight)
        dead = parts == 0
        parts = torch.where(dead, 1, parts)
        return torch.where(dead, weight, tap(weight * parts) / parts)

    # --- statistics ------------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, norm: Normalization) -> None:
        """Be this normalization, in place."""
        for tensor, values in (
            (self.gamma, norm.gamma),
            (self.running_mean, norm.mean),
            (self.running_var, norm.variance),
        ):
            tensor.copy_(torch.from_numpy(values))
        self.eps, self.momentum, self.known = norm.epsilon, 1 - norm.momentum, True

    @torch.no_grad()
    def renew(self, beta: Tensor) -> None:
        """Make statistics of the moments, in place; the first ones leave the function as it is.

        Args:
            beta: the stored bias.
        """
        assert self.moments is not None
        mean, variance = self.moments.mean, self.moments.variance
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        if not self.known:
            self.gamma.copy_((variance + self.eps).sqrt())
            # The variance that goes with the rounded gamma, so that folding changes no weight.
            self.running_var.copy_((self.gamma.double().square() - self.eps).clamp(min=0))
            beta.copy_(beta.double() + self.running_mean.double())
        self.known = True

    def get_extra_state(self) -> dict[str, Any]:
        """Return settings and flags."""
        names = ("eps", "momentum", "frozen", "known")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over saved settings and flags."""
        for name in ("eps", "momentum", "frozen", "known"):
            setattr(self, name, state[name])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "moments": None, "group": None}

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        state = "frozen" if self.frozen else "live" if self.known else "without statistics"
        return f"{len(self.gamma)}, eps={self.eps:g}, momentum={self.momentum:g}, {state}"
