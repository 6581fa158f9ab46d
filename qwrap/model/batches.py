"""stand-in."""

import numpy as np, torch


def iterate(batches, model):
    for b in batches:
        yield {k: torch.from_numpy(np.array(v)) for k, v in b.items()}
