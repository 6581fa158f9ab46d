"""What makes a calibrated model better before it is exported; one file each."""

from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.gptq import round_weights

__all__ = ["correct_biases", "round_weights"]
