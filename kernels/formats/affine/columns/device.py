"""The loops for tensors of a GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels.formats.affine.columns import reference
from lopro_fx.kernels.formats.affine.columns.triton import descend_kernel, fit_kernel, round_kernel
from lopro_fx.kernels.formats.affine.grid import MAX_SCALE, MIN_SCALE, SHRINK, Grid

# Rows of a program: few, since the columns come one after another and only rows run side by side.
_ROWS = 16
_BLOCK = 64


def fit_grid(block: Tensor, bits: int, weights: Tensor | None = None, steps: int = 24) -> Grid:
    """See `grid.fit_grid`."""
    (width, rows), top = block.shape, (1 << bits) - 1
    scale, zero = block.new_empty(rows), block.new_empty(rows)
    weights = block.new_ones(width) if weights is None else weights.contiguous()
    wrap_triton(fit_kernel)[(triton.cdiv(rows, _ROWS),)](
        block.contiguous(), weights, scale, zero, rows, steps, WIDTH=width, TOP=top, SHRINK=SHRINK,
        MIN_SCALE=MIN_SCALE, MAX_SCALE=MAX_SCALE, BLOCK_W=_BLOCK, BLOCK_M=_ROWS,
    )  # fmt: skip
    return Grid(scale, zero, top + 1)


def round_columns(columns: Tensor, target: Tensor, upper: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """See `reference.round_columns`."""
    width, rows = columns.shape
    error, codes = columns.new_empty(width, rows), columns.new_empty(width, rows, dtype=torch.uint8)
    read = [t.contiguous() for t in (columns, target, upper, grid.scale, grid.zero)]
    wrap_triton(round_kernel)[(triton.cdiv(rows, _ROWS),)](
        *read, codes, error, rows, rows if grid.scale.dim() == 2 else 0, WIDTH=width, TOP=grid.levels - 1,
        BLOCK_W=triton.next_power_of_2(width), BLOCK_M=_ROWS,
    )  # fmt: skip
    return error, codes


def descend_group(
    codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, top: int, scales: bool
) -> None:
    """See `reference.descend_group`; what changes in place is contiguous, and so are the rows of `gram`."""
    width, rows = codes.shape
    wrap_triton(descend_kernel)[(triton.cdiv(rows, _ROWS),)](
        codes, error, slope.contiguous(), gram, gram.stride(0), scale, zero.contiguous(), rows, width, TOP=top,
        MIN_SCALE=MIN_SCALE, MAX_SCALE=MAX_SCALE, SCALES=scales, BLOCK_W=triton.next_power_of_2(width), BLOCK_M=_ROWS,
    )  # fmt: skip


def descend_columns(
    codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, grid: Grid, group: int, scales: bool
) -> None:
    """See `reference.descend_columns`."""
    reference.descend_groups(descend_group, codes, error, slope, gram, grid, group, scales)
