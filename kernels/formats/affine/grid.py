"""Uniform asymmetric grids: one scale of 11 bits and one zero code for each (output row, group of input columns)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET
from lopro_fx.kernels.formats.scales import MOST, rounded_scale

# Bounds of a scale, for rows in units of their largest magnitude; a group of zeros gets the smallest.
MIN_SCALE = 2.0**-60
MAX_SCALE = MOST
# Largest part of a group's range that is cut off.
SHRINK = 0.6


@dataclass(frozen=True)
class Grid:
    """`scale` fp32 of 11 significant bits and `zero` fp32 holding `code + 1/2`: (m,) for one group, or (columns, m)."""

    scale: Tensor
    zero: Tensor
    levels: int

    def round(self, x: Tensor) -> Tensor:
        """Codes of x (..., m), as fp32 integers in [0, levels)."""
        return (x * (1.0 / self.scale) + self.zero).round_().clamp_(0, self.levels - 1)

    def value(self, codes: Tensor) -> Tensor:
        """Dequantise codes."""
        return (codes - self.zero) * self.scale


def _grid(low: Tensor, high: Tensor, levels: int) -> Grid:
    scale = rounded_scale(((high - low) / (levels - 1)).clamp(MIN_SCALE, MAX_SCALE))
    code = (-low / scale - ZERO_OFFSET).round_().clamp_(0, levels - 1)
    return Grid(scale, code + ZERO_OFFSET, levels)


def fit_grid(block: Tensor, bits: int, weights: Tensor | None = None, steps: int = 24) -> Grid:
    """Fit the grid of each row of one group by a search over clipping ranges.

    The range [min, max] of each row is shrunk towards zero in `steps` steps down to `1 - SHRINK` of itself; the range
    with the least weighted squared error is kept.

    Args:
        block: (g, m) weights, transposed: each column is a row of the matrix.
        bits: width of a code.
        weights: (g,) weight of each input column's error, or None for equal ones. GPTQ's own loss weighs the
            rounding error of column j by its pivot, so the pivots belong here.
        steps: candidate ranges; 0 keeps the full range.

    Returns:
        The best `Grid`; a row of equal weights gets a grid that holds the value itself within one scale step.
    """
    levels = 1 << bits
    low = block.amin(0).clamp_max(0)
    high = block.amax(0).clamp_min(0)
    best = _grid(low, high, levels)
    if not steps:
        return best
    best_error = _error(block, best, weights)
    for step in range(1, steps + 1):
        keep = 1 - SHRINK * step / steps
        grid = _grid(low * keep, high * keep, levels)
        error = _error(block, grid, weights)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero), levels)
    return best


def _error(block: Tensor, grid: Grid, weights: Tensor | None) -> Tensor:
    delta = grid.value(grid.round(block)).sub_(block).square_()
    return delta.sum(0) if weights is None else weights @ delta
