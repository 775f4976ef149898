"""Row units: before solving, each row of a weight is divided by a power of two near its largest magnitude.

The solution then doesn't depend on the magnitude of a weight or of its rows, up to the ends of fp32. Stored tensors are
in the weight's own unit, in fp16 where that has the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.formats.scales import MOST

# Smallest normal number of fp16.
_NORMAL = 2.0**-14


def row_units(weight: Tensor) -> Tensor:
    """fp32 (m, 1): the power of two at or below each row's largest magnitude, 0 for a row of zeros."""
    largest = weight.abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp_min(-125)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent - 1), 0.0)


def divided(rows: Tensor, units: Tensor) -> Tensor:
    """Return rows / units, with zeros where the unit is 0."""
    return torch.where(units > 0, rows / torch.where(units > 0, units, 1.0), 0.0)


def stored_factor_scale(scale: Tensor) -> Tensor:
    """Convert a factor's scales (rank,) from fp32 to fp16, unless fp16 lacks the range of the largest."""
    largest = scale.amax() if scale.numel() else scale.new_ones(())
    return scale.to(torch.float16) if _NORMAL <= largest <= MOST or largest == 0 else scale
