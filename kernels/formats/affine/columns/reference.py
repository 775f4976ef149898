"""The loops in plain ATen: the definition of the compiled ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.grid import MAX_SCALE, MIN_SCALE, Grid, fit_grid
from lopro_fx.kernels.formats.scales import rounded_scale

__all__ = ["descend_columns", "fit_grid", "round_columns"]


def round_columns(columns: Tensor, target: Tensor, upper: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round a block of columns, one after another, with feedback.

    Args:
        columns: fp32 (width, m), transposed weights.
        target: the same with the feedback of earlier blocks.
        upper: fp32 (width, width) unit upper triangular.
        grid: of all columns, or a row of it for each.

    Returns:
        `columns` less the rounded values, fp32 (width, m), and codes, uint8 (width, m).
    """
    target, error, codes = target.clone(), torch.empty_like(columns), torch.empty_like(columns)
    whole = Grid(grid.scale.expand_as(columns), grid.zero.expand_as(columns), grid.levels)
    for j in range(len(columns)):
        own = Grid(whole.scale[j], whole.zero[j], grid.levels)
        codes[j] = own.round(target[j])
        error[j] = columns[j] - own.value(codes[j])
        target[j + 1 :].addr_(upper[j, j + 1 :], error[j])
    return error, codes.to(torch.uint8)


def descend_columns(
    codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, grid: Grid, group: int, scales: bool
) -> None:
    """Lower tr(E H Eᵀ) over the codes of a block of columns, one after another, and over the scale of each group.

    A group's codes are visited before and after its scale. No step raises the loss.

    Args:
        codes: uint8 (width, m), changed in place.
        error: E, fp32 (width, m), transposed; changed in place.
        slope: (E H) of these columns, fp32 (width, m), transposed; it is used up.
        gram: fp32 (width, width), their part of H.
        grid: of each group, (groups, m); the scales are changed in place.
        group: columns that share a grid; the last group may have fewer.
        scales: whether to fit the scales.
    """
    descend_groups(descend_group, codes, error, slope, gram, grid, group, scales)


def descend_groups(
    descend: Callable[..., None], codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, grid: Grid, group: int,
    scales: bool,
) -> None:  # fmt: skip
    """`descend_columns` with `descend` in the place of `descend_group`."""
    for index, first in enumerate(range(0, len(codes), group)):
        part, later = slice(first, first + group), slice(first + group, None)
        before = error[part].clone()
        descend(
            codes[part], error[part], slope[part], gram[part, part], grid.scale[index], grid.zero[index],
            grid.levels - 1, scales,
        )  # fmt: skip
        slope[later] += gram[later, part] @ (error[part] - before)


def descend_group(
    codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, top: int, scales: bool
) -> None:
    """`descend_columns` for one group, with `scale` and `zero` (m,)."""
    code = codes.to(torch.float32)
    _move_codes(code, error, slope, gram, scale, top)
    if scales:
        _move_scale(code - zero, error, slope, gram, scale)
        _move_codes(code, error, slope, gram, scale, top)
    codes.copy_(code)


def _move_codes(code: Tensor, error: Tensor, slope: Tensor, gram: Tensor, scale: Tensor, top: int) -> None:
    # The loss is quadratic in each weight, with its minimum at q_j + (E H)_j / H_jj.
    inverse = 1.0 / scale
    for j in range(len(code)):
        best = (slope[j] / gram[j, j]).mul_(inverse).add_(code[j]).round_().clamp_(0, top)
        step = (code[j] - best).mul_(scale)
        code[j] = best
        error[j] += step
        slope.addr_(gram[:, j], step)


def _move_scale(levels: Tensor, error: Tensor, slope: Tensor, gram: Tensor, scale: Tensor) -> None:
    moved = gram @ levels
    normal, down = (moved * levels).sum(0), (slope * levels).sum(0)
    new = rounded_scale((scale + down / normal.clamp_min(1e-30)).clamp_min(0))
    step = new - scale
    # Rounding may take the step past the minimum.
    better = (step * (step * normal - 2 * down) < 0) & (new >= MIN_SCALE) & (new <= MAX_SCALE)
    step = torch.where(better, step, 0.0)
    scale += step
    error -= levels * step
    slope -= moved * step
