"""What makes a calibrated model better before it is exported; one file each."""

from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.equalization import equalize
from qwrap.algorithms.gptq import round_weights
from qwrap.algorithms.smooth_quant import Smoothed, smooth_quant

__all__ = ["Smoothed", "correct_biases", "equalize", "round_weights", "smooth_quant"]
