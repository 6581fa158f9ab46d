"""From what observers saw, or from weights, to the range that the codes should cover."""

from qwrap.quant.ranges.choose import Range, candidate_ranges, choose_ranges
from qwrap.quant.ranges.weights import choose_weight_range

__all__ = ["Range", "candidate_ranges", "choose_ranges", "choose_weight_range"]
