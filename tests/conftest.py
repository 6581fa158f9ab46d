"""Settings for every test."""

import torch

# Test processes run side by side; threads of one that wait spinning starve the others.
torch.set_num_threads(1)
