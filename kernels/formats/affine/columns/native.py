"""The compiled loops, for fp32 tensors of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.cpu.native import call
from lopro_fx.kernels.formats.affine.grid import SHRINK, Grid


def fit_grid(block: Tensor, bits: int, weights: Tensor | None = None, steps: int = 24) -> Grid:
    """See `grid.fit_grid`."""
    (width, rows), top = block.shape, (1 << bits) - 1
    scale, zero = block.new_empty(rows), block.new_empty(rows)
    weights = block.new_ones(width) if weights is None else weights
    call("lopro_affine_fit", width, rows, top, steps, SHRINK, block.contiguous(), weights.contiguous(), scale, zero)
    return Grid(scale, zero, top + 1)


def round_columns(columns: Tensor, target: Tensor, upper: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """See `reference.round_columns`."""
    width, rows = columns.shape
    error, codes = columns.new_empty(width, rows), columns.new_empty(width, rows, dtype=torch.uint8)
    stride = rows if grid.scale.dim() == 2 else 0
    read = (t.contiguous() for t in (columns, target, upper, grid.scale, grid.zero))
    call("lopro_affine_round", width, rows, grid.levels - 1, stride, *read, codes, error)
    return error, codes


def descend_columns(
    codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, grid: Grid, group: int, scales: bool
) -> None:
    """See `reference.descend_columns`; what changes in place is contiguous."""
    read = (t.contiguous() for t in (slope, gram, grid.zero))
    call("lopro_affine_descend", *codes.shape, grid.levels - 1, group, scales, *read, codes, error, grid.scale)
