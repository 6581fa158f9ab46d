"""Trigonometric and hyperbolic functions and their inverses."""

from __future__ import annotations

import torch

from qwrap.ops.registry import op

op("Acos", since=(7, 22))(torch.acos)
op("Acosh", since=(9, 22))(torch.acosh)
op("Asin", since=(7, 22))(torch.asin)
op("Asinh", since=(9, 22))(torch.asinh)
op("Atan", since=(7, 22))(torch.atan)
op("Atanh", since=(9, 22))(torch.atanh)
op("Cosh", since=(9, 22))(torch.cosh)
op("Sinh", since=(9, 22))(torch.sinh)
op("Tan", since=(7, 22))(torch.tan)
