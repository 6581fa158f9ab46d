"""What learns the rounding of a model part by part; the algorithms above choose what and how."""

from qwrap.reconstruct.drop import Drop, kernels_beside, mix
from qwrap.reconstruct.flex_round import FlexRound
from qwrap.reconstruct.learned_scale import LearnedScale
from qwrap.reconstruct.soft_round import Rounding, SoftRound, unlearnable

__all__ = [
    "Drop",
    "FlexRound",
    "LearnedScale",
    "Rounding",
    "SoftRound",
    "kernels_beside",
    "mix",
    "unlearnable",
]
