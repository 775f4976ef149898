"""LDLQ: sequential rounding with error feedback.

With H = U diag(d) Uᵀ, U unit upper triangular, the proxy loss of an error row e is Σ_j d_j ((e U)_j)². Rounding
w_j + Σ_{k<j} e_k U_kj makes (e U)_j the rounding error itself, so the loss is the sum of d_j times squared rounding
errors. LDLQ (Chee et al. 2307.13304) is GPTQ (Frantar et al. 2210.17323) in a form that never inverts H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET, group_count
from lopro_fx.methods.grid import Grid, fit_grid
from lopro_fx.methods.rounded import Rounded

MAX_DAMP = 1e6
# Columns whose feedback is applied one at a time before a GEMM updates the rest.
_BLOCK = 64


@dataclass(frozen=True)
class Feedback:
    """`upper` fp32 (n, n) unit upper triangular, `pivots` (n,), of the damped H; `damp` is the damping used."""

    upper: Tensor
    pivots: Tensor
    damp: float


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) I; an all-zero H becomes the identity, which is rounding to nearest."""
    mean = hessian.diagonal().mean().item()
    result = hessian.clone()
    result.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return result


def cholesky(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the damped H in H's dtype, and the damping used: ten times more at each failure."""
    while damp <= MAX_DAMP:
        factor, info = torch.linalg.cholesky_ex(damped(hessian, damp))
        if not info.item() and torch.isfinite(factor.diagonal()).all():
            return factor, damp
        damp = max(damp * 10, 1e-6)
    raise ArithmeticError(
        f"the Gram matrix has no Cholesky factor even with {MAX_DAMP:g} times its mean diagonal added"
    )


def feedback(hessian: Tensor, damp: float) -> Feedback:
    """Factor H (n, n) as U diag(d) Uᵀ by a Cholesky factorisation of the matrix read backwards."""
    factor, used = cholesky(hessian.flip(0, 1), damp)
    upper = factor.flip(0, 1)
    root = upper.diagonal().clone()
    return Feedback(upper / root, root.square(), used)


def round_with_feedback(
    weight: Tensor,
    fb: Feedback,
    bits: int,
    group_size: int,
    *,
    order: Tensor | None = None,
    static: bool = False,
    clip_steps: int = 24,
) -> Rounded:
    """Round W (m, n) fp32 to `bits` bits, rows in units of their own.

    Args:
        weight: fp32 (m, n).
        fb: feedback of the Gram, its columns already in `order`.
        bits: width of a code.
        group_size: columns that share a scale; -1 is the whole row.
        order: int64 (n,) columns in rounding order, or None for storage order. Column groups must stay together unless
            `static`, because a group's grid is fitted when its first column is reached.
        static: fit all grids to W before any rounding, so that `order` may be any permutation.
        clip_steps: candidate clipping ranges of a group, 0 for none.

    Returns:
        `Rounded`, in storage order whatever `order` is.
    """
    m, n = weight.shape
    size = n if group_size == -1 else group_size
    storage = torch.arange(n, dtype=torch.int64, device=weight.device) if order is None else order
    columns, group = weight.T[storage], storage // size
    codes = weight.new_empty(n, m)
    error = weight.new_empty(n, m)
    scales = weight.new_empty(group_count(n, group_size), m)
    zeros = torch.empty_like(scales)
    ranks = group.cpu()  # read once: each read waits for the device
    if static:
        pivots = torch.empty_like(fb.pivots).index_copy_(0, storage, fb.pivots)
        for i, (block, weights) in enumerate(zip(weight.T.split(size), pivots.split(size), strict=True)):
            grid = fit_grid(block, bits, weights, clip_steps)
            scales[i], zeros[i] = grid.scale, grid.zero
        starts = [*range(0, n, _BLOCK), n]
    else:
        starts = [0, *(torch.nonzero(ranks[1:] != ranks[:-1]).flatten() + 1).tolist(), n]
    for start, end in pairwise(starts):
        part = slice(start, end)
        target = columns[part] + fb.upper[:start, part].T @ error[:start]
        if not static:
            grid = fit_grid(target, bits, fb.pivots[part], clip_steps)
            scales[int(ranks[start])], zeros[int(ranks[start])] = grid.scale, grid.zero
        grid = Grid(scales[group[part]], zeros[group[part]], 1 << bits)
        _round_block(columns[part], target, fb.upper[part, part], grid, codes[part], error[part])
    codes = torch.empty_like(codes).index_copy_(0, storage, codes)
    as_code = torch.uint8
    return Rounded(
        codes.T.to(as_code).contiguous(),
        scales.T.contiguous(),
        (zeros - ZERO_OFFSET).T.to(as_code).contiguous(),
        group_size,
    )


def _round_block(columns: Tensor, target: Tensor, upper: Tensor, grid: Grid, codes: Tensor, error: Tensor) -> None:
    """Fill `codes` and `error` (width, m) of consecutive columns, each with its row of `grid`; `target` is consumed."""
    width = columns.shape[0]
    inverse = 1.0 / grid.scale
    for j in range(width):
        code = (target[j] * inverse[j]).add_(grid.zero[j]).round_().clamp_(0, grid.levels - 1)
        codes[j] = code
        torch.sub(columns[j], (code - grid.zero[j]).mul_(grid.scale[j]), out=error[j])
        if j + 1 < width:
            target[j + 1 :].addr_(upper[j, j + 1 :], error[j])


def proxy_loss(error: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) for E (m, n) and the undamped H (n, n)."""
    loss = ((error @ hessian) * error).sum().item()
    return loss if math.isfinite(loss) else math.inf


def relative_loss(loss: float, weight: Tensor, gram: Tensor) -> float:
    """Loss over tr(W H Wᵀ), 0 for a weight that does nothing."""
    whole = proxy_loss(weight, gram)
    return loss / whole if whole > 0 else 0.0
