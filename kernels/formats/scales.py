"""Scales of 11 significant bits: fp16 where that has the range, else fp32."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest number of fp16.
MOST = 65504.0
# Bits of an fp32 fraction that fp16 lacks.
_CUT = 13


def rounded_scale(scale: Tensor) -> Tensor:
    """Round fp32 to the 11 significant bits of fp16, at any exponent."""
    bits = scale.contiguous().view(torch.int32)
    half = (1 << _CUT - 1) - 1 + ((bits >> _CUT) & 1)
    return ((bits + half) & -(1 << _CUT)).view(torch.float32)


def stored_scales(scales: Tensor, bits: int) -> Tensor:
    """Convert scales (m, groups) from fp32 to fp16; a matrix with any row that fp16 can't hold keeps fp32.

    Below its normal range fp16 rounds a scale; the ends of a row's range, 2^bits steps, may move by an eighth of a
    step.
    """
    largest = scales.amax(1)
    fits = (largest == 0) | ((largest >= 2.0 ** (bits - 23)) & (largest <= MOST))
    return scales.to(torch.float16) if fits.all() else scales


def fit_row_scales(weight: Tensor, levels: Tensor, gram: Tensor, scales: Tensor) -> Tensor:
    """Fit the scales (m,) of whole rows that minimise tr(E H Eᵀ), E = weight - scales * levels, by least squares.

    A row keeps its scale where that of 11 bits would raise the loss.
    """
    moved = levels @ gram
    normal, product = (moved * levels).sum(1), (moved * weight).sum(1)
    new = rounded_scale(product / normal.clamp_min(torch.finfo(torch.float32).tiny))
    step, down = new - scales, product - scales * normal
    better = (step * (step * normal - 2 * down) < 0) & torch.isfinite(new) & (new > 0)
    return torch.where(better, new, scales)
