"""What the benchmark of accuracy quantizes to, and how close to float a file has to stay."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_CLASSIFIERS = ("squeezenet1_0_imagenet", "mobilenetv2_cifar10_128", "resnet20_cifar10")


@dataclass(frozen=True, slots=True)
class Setting:
    """Bits of weights and activations, the same in all layers; ``models`` None stands for all."""

    weight: int
    activation: int
    models: tuple[str, ...] | None = None

    def suits(self, model: str) -> bool:
        """Whether the setting makes sense for a model."""
        return self.models is None or model in self.models


SETTINGS = {
    "W8A8": Setting(8, 8),
    "W4A8": Setting(4, 8),
    "W4A4": Setting(4, 4, (*IMAGE_CLASSIFIERS, "mnist_cntk")),  # the others lose everything
}

_EIGHT_BITS = {  # the metric itself
    "squeezenet1_0_imagenet": 0.580,
    "mobilenetv2_cifar10_128": 0.816,
    "resnet20_cifar10": 0.912,
    "mnist_cntk": 0.975,
    "nanodet_m_320": 0.405,
    "espnetv2_s2_voc_256": 0.424,
    "super_resolution": 30.057,
    "ppocr_en_number_rec": 0.817,
    "silero_vad": 0.985,
    "minilm_l6": 0.739,
    "stories260k": 3.655,
}
_FOUR_BITS = {**dict.fromkeys(IMAGE_CLASSIFIERS, 0.015), "minilm_l6": 0.02}  # off float


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a task metric is the better one."""
    return metric.startswith("perplexity")


def bound(model: str, setting: str, reference: float) -> float | None:
    """The metric that a file has to reach, None where nothing is asked.

    Args:
        model: its name.
        setting: a key of SETTINGS.
        reference: the float file's metric.
    """
    if setting == "W8A8":
        return _EIGHT_BITS.get(model)
    if setting == "W4A8" and model in _FOUR_BITS:
        return reference - _FOUR_BITS[model]
    return None


def reaches(value: float, least: float, metric: str) -> bool:
    """Whether a metric is at the bound or on its good side, to within rounding."""
    return value <= least + 1e-9 if lower_is_better(metric) else value >= least - 1e-9
