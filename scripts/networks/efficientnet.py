"""EfficientNet-B0: Tan and Le, arXiv:1905.11946, table 1; names as in torchvision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# expansion, kernel, stride of the first, channels, repeats
STAGES = (
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)


def convolution(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Return convolution, normalisation and, if wanted, SiLU."""
    layers = [
        nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([nn.SiLU(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    """Scale each channel by what the mean of all channels says."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` scaled."""
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class MBConv(nn.Module):
    """Expand, convolve each channel by itself, squeeze and excite, project."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(convolution(channels, hidden, 1))
        layers += [
            convolution(hidden, hidden, kernel, stride, hidden),
            SqueezeExcitation(hidden, max(1, channels // 4)),
            convolution(hidden, out, 1, activation=False),
        ]
        self.block = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection, plus ``x`` where the shape stays."""
        return self.block(x) + x if self.use_res_connect else self.block(x)


class EfficientNet(nn.Module):
    """Stages of MBConv between a strided stem and a 1x1 convolution four times as wide."""

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int, int]] = STAGES,
        stem: int = 32,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, stem, 3, 2)]
        channels = stem
        for expansion, kernel, stride, out, repeats in stages:
            blocks = []
            for i in range(repeats):
                blocks.append(MBConv(channels, out, kernel, 1 if i else stride, expansion))
                channels = out
            layers.append(nn.Sequential(*blocks))
        layers.append(convolution(channels, 4 * channels, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(0.2, inplace=True), nn.Linear(4 * channels, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images ``[N, 3, H, W]``."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
