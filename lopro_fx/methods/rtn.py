"""Rounding to nearest, one group of input columns at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.packing.format import ZERO_OFFSET
from lopro_fx.methods.gptq import Rounded
from lopro_fx.methods.grid import fit_grid


def round_to_nearest(weight: Tensor, bits: int, group_size: int, clip_steps: int) -> Rounded:
    """Round W (m, n) fp32; arguments as in `gptq.round_with_feedback`."""
    codes, scales, zeros = [], [], []
    for block in weight.T.split(weight.shape[1] if group_size == -1 else group_size):
        grid = fit_grid(block, bits, None, clip_steps)
        codes.append(grid.round(block))
        scales.append(grid.scale)
        zeros.append(grid.zero - ZERO_OFFSET)
    code = torch.uint8
    return Rounded(
        torch.cat(codes).T.to(code).contiguous(),
        torch.stack(scales, 1),
        torch.stack(zeros, 1).to(code),
        group_size,
    )
