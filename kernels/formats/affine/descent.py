"""Coordinate descent after rounding: choose each code again with all others fixed, then fit all scales of a row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.grid import MAX_SCALE, MIN_SCALE
from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.kernels.formats.scales import rounded_scale

# Rows whose scales are solved together; each takes groups² numbers.
_ROWS = 1024


def descend(weight: Tensor, gram: Tensor, rounded: AffineRounded, sweeps: int) -> AffineRounded:
    """Lower tr(E H Eᵀ), E = W - Q̂, by `sweeps` passes over the columns, each followed by a fit of the scales.

    The loss is quadratic in each weight, with its minimum at q_j + (E H)_j / H_jj; the nearest level to that minimum is
    the best code given the others, so no step raises the loss.

    Args:
        weight: fp32 (m, n).
        gram: fp32 (n, n), H with the rounding's damping.
        rounded: the codes to start from; not changed.
        sweeps: passes; 0 returns `rounded`.
    """
    if not sweeps:
        return rounded
    n = weight.shape[1]
    size = n if rounded.group_size == -1 else rounded.group_size
    for _ in range(sweeps):
        codes = rounded.codes.T.to(torch.float32).contiguous()
        scales = rounded.scales.T.contiguous()
        error = (weight - rounded.dense()).T.contiguous()
        for group, columns in enumerate(_slices(n, size)):
            _descend_group(
                codes[columns], error[columns], gram[columns] @ error, gram[columns, columns], scales[group],
                (1 << rounded.bits) - 1,
            )  # fmt: skip
        rounded = replace(rounded, codes=codes.T.to(torch.uint8).contiguous())
        rounded = fit_scales(weight, gram, rounded)
    return rounded


def fit_scales(weight: Tensor, gram: Tensor, rounded: AffineRounded) -> AffineRounded:
    """Fit the scales that minimise tr(E H Eᵀ) for given codes and zeros, by least squares over each row's groups.

    A row keeps its scales if the loss doesn't fall, which the rounding of the new ones may cause.
    """
    parts = [slice(i, i + _ROWS) for i in range(0, weight.shape[0], _ROWS)]
    scales = torch.cat([_fit_rows(weight[rows], gram, rounded, rows) for rows in parts])
    return replace(rounded, scales=scales)


def _fit_rows(weight: Tensor, gram: Tensor, rounded: AffineRounded, rows: slice) -> Tensor:
    m, n = weight.shape
    size = n if rounded.group_size == -1 else rounded.group_size
    old = rounded.scales[rows]
    groups = old.shape[1]
    index = torch.arange(n, dtype=torch.int64, device=weight.device) // size
    level = rounded.codes[rows].to(torch.float32) - (rounded.zeros[rows].to(torch.float32) + ZERO_OFFSET)[:, index]

    def by_group(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, groups * size - n)).view(m, groups, size).sum(-1)

    error = weight - level * old[:, index]
    slope = by_group((error @ gram) * level)
    normal = torch.stack([by_group(level[:, part] @ gram[part] * level) for part in _slices(n, size)], 1)
    # A group whose levels are nearly orthogonal to the calibration data keeps its scale: a fitted one is arbitrary.
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-4 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    new = old + torch.linalg.solve(normal, slope.unsqueeze(-1)).squeeze(-1)
    new = rounded_scale(new)
    changed = weight - level * new[:, index]
    better = ((changed @ gram) * changed).sum(1) < ((error @ gram) * error).sum(1)
    better &= ((new >= MIN_SCALE) & (new <= MAX_SCALE)).all(1)
    return torch.where(better.unsqueeze(1), new, old)


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _descend_group(codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, scale: Tensor, top: int) -> None:
    """Descend over one column group; `codes`, `error` and `slope` = (H Eᵀ), (width, m), are updated in place."""
    inverse = 1.0 / scale
    for j in range(codes.shape[0]):
        best = (slope[j] / gram[j, j]).mul_(inverse).add_(codes[j]).round_().clamp_(0, top)
        step = (codes[j] - best).mul_(scale)
        codes[j] = best
        error[j] += step
        slope.addr_(gram[:, j], step)
