"""The networks by name: real and small variants, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.bert import Bert
from networks.efficientnet import EfficientNet
from networks.llama import Llama
from networks.mobilenet import MobileNetV2
from networks.resnet import BasicBlock, ResNet
from networks.vit import VisionTransformer

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One architecture.

    Attributes:
        real: makes it as published.
        small: makes it with few narrow layers of every kind.
        inputs: ``(module, batch, size, generator)`` -> inputs by name, in order; ``size`` is the
            side of images or the number of tokens.
        dynamic: input name up to the first dot -> axis -> name of its size, where that varies.
        real_size: ``size`` for the real network.
        small_sizes: two values of ``size`` for the small network, equal if it takes but one.
        is_transformer: whether matrix products do its work, not convolutions.
    """

    real: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, int, torch.Generator], Inputs]
    dynamic: Mapping[str, Mapping[int, str]]
    real_size: int
    small_sizes: tuple[int, int]
    is_transformer: bool

    def make(self, small: bool) -> nn.Module:
        """Return the network with seeded random weights, for evaluation.

        Weights are drawn so that no two tensors are equal: exporters would merge them.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            module = self.small() if small else self.real()
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
            size = self.small_sizes[0] if small else self.real_size
            _settle_statistics(module, self.sample(module, 4, size, seed=1))
        return module.eval()

    def sample(self, module: nn.Module, batch: int, size: int, seed: int) -> Inputs:
        """Return random inputs."""
        return self.inputs(module, batch, size, torch.Generator().manual_seed(seed))

    def axes(self, name: str) -> Mapping[int, str]:
        """Return the axes of input ``name`` that vary, with the names of their sizes."""
        return self.dynamic[name.partition(".")[0]]


@torch.no_grad()
def _settle_statistics(module: nn.Module, inputs: Inputs) -> None:
    """Make the running statistics those of ``inputs``, so that values neither fade nor explode."""
    layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not layers:
        return
    for layer in layers:
        layer.momentum = 1.0
    module.train()(*inputs.values())
    for layer in layers:
        layer.momentum = 0.1
        # Where few values were seen the variance may be near zero.
        layer.running_var.clamp_(min=1e-2)


def _image(_: nn.Module, batch: int, size: int, generator: torch.Generator) -> Inputs:
    return {"image": torch.randn(batch, 3, size, size, generator=generator)}


def _text(module: nn.Module, batch: int, size: int, generator: torch.Generator) -> Inputs:
    words = module.embeddings.word_embeddings.num_embeddings
    mask = torch.ones(batch, size, dtype=torch.int64)
    mask[0, -(size // 4) :] = 0  # padding
    return {
        "input_ids": torch.randint(0, words, (batch, size), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (batch, size), generator=generator),
    }


def _tokens(module: nn.Module, batch: int, size: int, generator: torch.Generator) -> Inputs:
    attention = module.layers[0].self_attn
    past = (batch, attention.kv_heads, size // 2, attention.size)
    words = module.embed_tokens.num_embeddings
    ids = torch.randint(0, words, (batch, size), generator=generator)
    names = [f"past.{i}.{what}" for i in range(len(module.layers)) for what in ("key", "value")]
    return {"input_ids": ids, **{name: torch.randn(past, generator=generator) for name in names}}


def _convolutional(
    real: Callable[[], nn.Module], small: Callable[[], nn.Module], small_sizes: tuple[int, int]
) -> Network:
    return Network(
        real=real,
        small=small,
        inputs=_image,
        dynamic={"image": {0: "batch", 2: "height", 3: "width"}},
        real_size=224,
        small_sizes=small_sizes,
        is_transformer=False,
    )


NETWORKS: dict[str, Network] = {
    "resnet18": _convolutional(
        lambda: ResNet((2, 2, 2, 2), block=BasicBlock),
        lambda: ResNet((2, 1), 8, 10, BasicBlock),
        (40, 64),
    ),
    "resnet50": _convolutional(ResNet, lambda: ResNet((2, 1), 8, 10), (40, 64)),
    "mobilenet_v2": _convolutional(
        MobileNetV2,
        lambda: MobileNetV2(((1, 8, 1, 1), (6, 12, 2, 2)), 8, 32, 10),
        (32, 48),
    ),
    "efficientnet_b0": _convolutional(
        EfficientNet,
        lambda: EfficientNet(((1, 3, 1, 8, 1), (6, 5, 2, 12, 2)), 8, 10),
        (32, 48),
    ),
    "vit_b_16": Network(
        real=VisionTransformer,
        small=lambda: VisionTransformer(32, 8, 2, 32, 4, 64, 10),
        inputs=_image,
        dynamic={"image": {0: "batch"}},
        real_size=224,
        small_sizes=(32, 32),
        is_transformer=True,
    ),
    "bert_base": Network(
        real=Bert,
        small=lambda: Bert(100, 40, 2, 32, 4, 64),
        inputs=_text,
        dynamic={
            name: {0: "batch", 1: "tokens"}
            for name in ("input_ids", "attention_mask", "token_type_ids")
        },
        real_size=128,
        small_sizes=(12, 20),
        is_transformer=True,
    ),
    "llama": Network(
        real=Llama,
        small=lambda: Llama(100, 2, 32, 4, 2, 48),
        inputs=_tokens,
        dynamic={"input_ids": {0: "batch", 1: "tokens"}, "past": {0: "batch", 2: "before"}},
        real_size=128,
        small_sizes=(12, 20),
        is_transformer=True,
    ),
}
