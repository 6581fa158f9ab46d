"""A look at a histogram."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOG = logging.getLogger(__name__)


def apply_plot(hist: NDArray[Any], hist_edges: NDArray[Any]) -> None:
    """Show a histogram in a window of matplotlib, which is imported here, and log its numbers.

    Args:
        hist: counts.
        hist_edges: borders of the bins.
    """
    import matplotlib.pyplot as plt  # only for those who look

    with np.printoptions(threshold=sys.maxsize):
        _LOG.info("Histogram:\n%s\nHistogram Edges:\n%s", hist, hist_edges)
    plt.stairs(hist, hist_edges, fill=True)
    plt.xlabel("Tensor value")
    plt.ylabel("Counts")
    plt.title("Tensor value V.S. Counts")
    plt.show()
