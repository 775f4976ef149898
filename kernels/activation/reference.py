"""The definition of a rounded activation, plain ATen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = (4, 8)
# Columns that may share a step; -1 for all.
GROUPS = (-1, 32, 64, 128)
# Default columns per step: rotation spreads outliers; unrotated, an outlier costs the columns of its step bits.
ROTATED_GROUP, PLAIN_GROUP = 128, 32
# Groups whose largest magnitude is at most this are zero: far below it, their step would be subnormal.
LEAST = 1e-30


def group_for(rotated: bool) -> int:
    """Default number of columns that share a step."""
    return ROTATED_GROUP if rotated else PLAIN_GROUP


def clip_for(bits: int, columns: int) -> float:
    """Part of the largest magnitude of `columns` numbers that becomes the largest integer; larger numbers are clipped.

    With 4 bits, the least mean squared error of Gaussian, Laplacian and Student-t (5) numbers is at 0.95 for 32 columns
    and at 0.05 less for each doubling, down to about 0.7. With 8 bits clipping gains nothing.
    """
    return 1.0 if bits > 4 else min(1.0, max(0.7, 1.2 - 0.05 * math.log2(columns)))


def integers(x: Tensor, top: int, group: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Round x (..., n) to symmetric integers, halves to even, with one step for each run of `group` columns.

    Args:
        x: any floating-point dtype; the arithmetic is fp32.
        top: largest integer, such as 127 for 8 bits.
        group: columns that share a step, -1 for all; the last group may have fewer.
        clip: see `clip_for`.

    Returns:
        fp32 (..., groups, group) whole numbers in [-top, top], padded with zeros, and the step fp32 (..., groups):
        clip * largest magnitude / top.
    """
    size = x.shape[-1] if group == -1 else group
    parts = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    most = parts.abs().amax(-1)
    small = most <= LEAST
    most = most * clip
    # Two tensors: of a number and a tensor, torch multiplies by the reciprocal, which rounds twice.
    inverse = torch.where(small, 0.0, torch.full_like(most, top) / most)
    step = torch.where(small, 0.0, most * (1.0 / top))
    codes = torch.round(parts * inverse.unsqueeze(-1))
    return codes if clip == 1.0 else codes.clamp(-top, top), step


def round_activation(x: Tensor, bits: int, group: int) -> Tensor:
    """x (..., n) rounded to `bits` bits a number, of its dtype; see `integers`.

    Args:
        x: activation.
        bits: 4 or 8.
        group: columns that share a step, or -1 for the whole token.
    """
    clip = clip_for(bits, x.shape[-1] if group == -1 else group)
    codes, step = integers(x, (1 << (bits - 1)) - 1, group, clip)
    return (codes * step.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
