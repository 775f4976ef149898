"""Units in which a problem is solved: each row of a weight is divided by a power of two near its largest magnitude.

Solving is then the same for any unit of a weight, and of each of its rows, up to the ends of fp32. What is stored goes
back to the weight's own unit, in fp16 where that has the range.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest and smallest normal number of fp16.
_MOST, _NORMAL = 65504.0, 2.0**-14
# Bits of an fp32 fraction that fp16 hasn't.
_CUT = 13


def row_units(weight: Tensor) -> Tensor:
    """fp32 (m, 1): the power of two at or below each row's largest magnitude, 0 for a row of zeros."""
    largest = weight.abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp_min(-125)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent - 1), 0.0)


def divided(rows: Tensor, units: Tensor) -> Tensor:
    """rows / units, and zeros where the unit is 0."""
    return torch.where(units > 0, rows / torch.where(units > 0, units, 1.0), 0.0)


def rounded_scale(scale: Tensor) -> Tensor:
    """fp32 with the 11 significant bits of fp16, at any exponent."""
    bits = scale.contiguous().view(torch.int32)
    half = (1 << _CUT - 1) - 1 + ((bits >> _CUT) & 1)
    return ((bits + half) & -(1 << _CUT)).view(torch.float32)


def stored_scales(scales: Tensor, bits: int) -> Tensor:
    """Scales (m, groups) fp32 as they are kept: fp16, or fp32 for a matrix that has rows which fp16 can't hold.

    Below its normal range fp16 rounds a scale; the ends of a row's range may move by an eighth of a step.
    """
    largest = scales.amax(1)
    fits = (largest == 0) | ((largest >= 2.0 ** (bits - 23)) & (largest <= _MOST))
    return scales.to(torch.float16) if fits.all() else scales


def stored_factor_scale(scale: Tensor) -> Tensor:
    """Scales (rank,) fp32 of a factor's components as they are kept: fp16 where it has the range of the largest."""
    largest = scale.amax() if scale.numel() else scale.new_ones(())
    return scale.to(torch.float16) if _NORMAL <= largest <= _MOST or largest == 0 else scale
