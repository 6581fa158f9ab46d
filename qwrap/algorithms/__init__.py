"""What makes a calibrated model better before it is exported; one file each."""

from qwrap.algorithms.absorption import absorb_biases
from qwrap.algorithms.adaround import adaround
from qwrap.algorithms.batch_norm import restore_channels
from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.brecq import brecq
from qwrap.algorithms.clipping import clip_activations
from qwrap.algorithms.equalization import equalize
from qwrap.algorithms.flexround import flexround
from qwrap.algorithms.gptq import round_weights
from qwrap.algorithms.range_choice import choose_methods
from qwrap.algorithms.sequential_mse import sequential_mse
from qwrap.algorithms.smooth import smooth
from qwrap.algorithms.smooth_quant import Smoothed, smooth_quant

__all__ = [
    "Smoothed",
    "absorb_biases",
    "adaround",
    "brecq",
    "choose_methods",
    "clip_activations",
    "correct_biases",
    "equalize",
    "flexround",
    "restore_channels",
    "round_weights",
    "sequential_mse",
    "smooth",
    "smooth_quant",
]
