"""Coordinate descent after rounding: each code and each scale again, with all others fixed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.columns.choice import loops
from lopro_fx.kernels.formats.affine.grid import Grid
from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.kernels.formats.scales import fit_row_scales

# Columns of one product with the Gram: a multiple of every group size.
_BLOCK = 256


def descend(weight: Tensor, gram: Tensor, rounded: AffineRounded, sweeps: int) -> AffineRounded:
    """Lower tr(E H Eᵀ), E = W - Q̂, by `sweeps` passes over the columns, each of one product E H.

    No step raises the loss, but for rounding errors of fp32.

    Args:
        weight: fp32 (m, n).
        gram: fp32 (n, n), H with the rounding's damping.
        rounded: the codes to start from; not changed.
        sweeps: passes; 0 returns `rounded`.
    """
    if not sweeps:
        return rounded
    n, levels = weight.shape[1], 1 << rounded.bits
    group = n if rounded.group_size == -1 else rounded.group_size
    inside = group <= _BLOCK  # or the one group of a row, whose scale needs all of its slopes
    codes, error = rounded.codes.T.contiguous(), (weight - rounded.dense()).T.contiguous()
    scales = rounded.scales.T.contiguous().clone()
    zeros = (rounded.zeros.to(torch.float32) + ZERO_OFFSET).T.contiguous()
    for _ in range(sweeps):
        for first in range(0, n, _BLOCK):
            part = slice(first, first + _BLOCK)
            grids = slice(first // group, -(-min(first + _BLOCK, n) // group))
            grid = Grid(scales[grids], zeros[grids], levels)
            own = group if inside else len(codes[part])
            loops(weight).descend_columns(
                codes[part], error[part], gram[part] @ error, gram[part, part], grid, own, inside
            )
        if not inside:
            level = codes.to(torch.float32) - zeros
            scales = fit_row_scales(weight, level.T, gram, scales[0]).unsqueeze(0)
            error = (weight.T - level * scales).contiguous()
    return replace(rounded, codes=codes.T.contiguous(), scales=scales.T.contiguous())
