"""LDLQ: sequential rounding with error feedback.

With H = U diag(d) Uᵀ, U unit upper triangular, the proxy loss of an error row e is Σ_j d_j ((e U)_j)². Rounding
w_j + Σ_{k<j} e_k U_kj makes (e U)_j the rounding error itself, so the loss is the sum of d_j times squared rounding
errors. LDLQ (Chee et al. 2307.13304) is GPTQ (Frantar et al. 2210.17323) in a form that never inverts H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.kernels.formats.quantizer import Quantizer, Rounded, blocks

MAX_DAMP = 1e6
# Columns of a product whose result is summed.
_BLOCK = 1024


@dataclass(frozen=True)
class Feedback:
    """`upper` fp32 (n, n) unit upper triangular, `pivots` (n,), of the damped H; `damp` is the damping used."""

    upper: Tensor
    pivots: Tensor
    damp: float


def damping(hessian: Tensor, damp: float) -> Tensor:
    """damp * mean(diag H), a scalar; 1 for an all-zero H, whose rounding is then to nearest."""
    mean = hessian.diagonal().mean()
    return torch.where(mean > 0, damp * mean, 1.0)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with `damping` added to its diagonal."""
    result = hessian.clone()
    result.diagonal().add_(damping(hessian, damp))
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
    quantizer: Quantizer,
    rows: Sequence[int] = (),
    *,
    order: Tensor | None = None,
    importance: Tensor | None = None,
    static: bool = False,
) -> Rounded:
    """Round W (m, n) fp32, rows in units of their own, block by block.

    Args:
        weight: fp32 (m, n).
        fb: feedback of the Gram, its columns already in `order`.
        quantizer: of the format to round to.
        rows: of each layer in W; all of them belong to one by default.
        order: int64 (n,) columns in rounding order, or None for storage order.
        importance, static: see `Quantizer.rounder`.

    Returns:
        The rounded matrix, in storage order whatever `order` is.
    """
    rounder = quantizer.rounder(weight, rows or (weight.shape[0],), order, fb.pivots, importance, static)
    columns = weight.T if order is None else weight.T[order]
    error = weight.new_empty(weight.shape[1], weight.shape[0])
    for part in blocks(rounder):
        target = columns[part] + fb.upper[: part.start, part].T @ error[: part.start]
        error[part] = rounder.round(part, columns[part], target, fb.upper[part, part], fb.pivots[part])
    return rounder.rounded()


def proxy_loss(error: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) for E (m, n) and the undamped symmetric H (n, n), of which the upper triangle is read."""
    loss = torch.zeros((), dtype=error.dtype, device=error.device)
    for first in range(0, error.shape[1], _BLOCK):
        own, later = error[:, first : first + _BLOCK], error[:, first + _BLOCK :]
        rows = hessian[first : first + _BLOCK]
        moved = own @ rows[:, first : first + _BLOCK]
        moved.addmm_(later, rows[:, first + _BLOCK :].T, alpha=2)
        loss += (moved * own).sum()
    return loss.item() if torch.isfinite(loss) else math.inf


def relative_loss(loss: float, weight: Tensor, gram: Tensor) -> float:
    """Loss over tr(W H Wᵀ), 0 for a weight that does nothing."""
    whole = proxy_loss(weight, gram)
    return loss / whole if whole > 0 else 0.0
