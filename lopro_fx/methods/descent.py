"""Coordinate descent on codes: after rounding with feedback, each code is chosen again with all others fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.methods.gptq import Rounded, damped


def descend(weight: Tensor, hessian: Tensor, rounded: Rounded, bits: int, sweeps: int, damp: float) -> Rounded:
    """Lower tr(E H Eᵀ), E = W - Q̂, by `sweeps` passes over the columns with the grids fixed.

    The loss is quadratic in each weight, with its minimum at q_j + (E H)_j / H_jj; the nearest level to that minimum is
    the best code given the others, so no step raises the loss of the damped H.

    Args:
        weight: fp32 (m, n).
        hessian: fp32 (n, n), undamped.
        rounded: the codes to start from; not changed.
        bits: width of a code.
        sweeps: passes; 0 returns `rounded`.
        damp: part of the mean diagonal added to H's diagonal, as in the rounding.
    """
    if not sweeps:
        return rounded
    n = weight.shape[1]
    size = n if rounded.group_size == -1 else rounded.group_size
    gram = damped(hessian, damp)
    codes = rounded.codes.T.to(torch.float32).contiguous()
    scales = rounded.scales.T.contiguous()
    error = (weight - rounded.dense()).T.contiguous()
    for _ in range(sweeps):
        for group, start in enumerate(range(0, n, size)):
            columns = slice(start, min(start + size, n))
            _descend_group(
                codes[columns], error[columns], gram[columns] @ error, gram[columns, columns], scales[group],
                (1 << bits) - 1,
            )  # fmt: skip
    return Rounded(codes.T.to(torch.uint8).contiguous(), rounded.scales, rounded.zeros, rounded.group_size)


def _descend_group(codes: Tensor, error: Tensor, slope: Tensor, gram: Tensor, scale: Tensor, top: int) -> None:
    """One group's columns: `codes`, `error` and `slope` = (H Eᵀ) are (width, m) and updated in place."""
    inverse = 1.0 / scale
    for j in range(codes.shape[0]):
        best = (slope[j] / gram[j, j]).mul_(inverse).add_(codes[j]).round_().clamp_(0, top)
        step = (codes[j] - best).mul_(scale)
        codes[j] = best
        error[j] += step
        slope.addr_(gram[:, j], step)
