"""Low-rank factors: R1-sketch, block randomised SVD, the optimal correction in the Gram norm, and int8 rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lopro_fx.kernels.formats.scales import rounded_scale
from lopro_fx.layer import Factor
from lopro_fx.methods.ldlq import cholesky, damped
from lopro_fx.methods.prior import FACTOR_DAMP

# Range of a weight's unit in which fp16 holds its up factors without a scale.
_NEAR_ONE = 2.0**-10, 2.0**10


def round_factor(factor: Tensor, bits: int, dim: int) -> Factor:
    """Round a factor to `bits` = 8 (int8, one scale of 11 significant bits a component) or 16 (fp16)."""
    if bits == 16:
        return Factor(factor.clamp(-65504, 65504).to(torch.float16), None, dim)
    amax = factor.abs().amax(1 - dim) if factor.numel() else factor.new_zeros(factor.shape[dim])
    scale = rounded_scale((amax.to(torch.float32) / 127).clamp_min(torch.finfo(torch.float32).tiny))
    codes = (factor / scale.unsqueeze(1 - dim)).round_().clamp_(-127, 127)
    return Factor(codes.to(torch.int8), scale, dim)


def in_unit(factor: Factor, unit: float) -> Factor:
    """Multiply the factor by a power of two, in its scales; fp16 values get scales where fp16 lacks the range."""
    if factor.scale is not None:
        return replace(factor, scale=factor.scale * unit)
    if _NEAR_ONE[0] <= unit <= _NEAR_ONE[1]:
        return replace(factor, values=factor.values * unit)
    return replace(
        factor,
        scale=torch.full((factor.values.shape[factor.dim],), unit, dtype=torch.float32, device=factor.values.device),
    )


def randomized_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, iterations: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triplets (m, r), (r,), (r, n) by block subspace iteration (Halko et al. 0909.4061, 4.4).

    Needs `2 * iterations + 2` passes over the matrix, each a GEMM of width rank + oversample.
    """
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    basis = matrix @ _normal((n, width), matrix, generator)
    for _ in range(iterations):
        basis = torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(matrix.T @ basis).Q
    basis = torch.linalg.qr(basis).Q
    small_u, sigma, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ small_u)[:, :rank], sigma[:rank], vh[:rank]


def r1_sketch(
    matrix: Tensor,
    rank: int,
    generator: torch.Generator,
    iterations: int = 8,
    rounding: Callable[[Tensor], Tensor] = lambda v: v,
) -> tuple[Tensor, Tensor]:
    """Rank-one deflation (LoPRo equations 10-12): left (m, r) and right (r, n) with left @ right close to the matrix.

    Each component is found by power iteration on the current remainder and rounded. It is subtracted with the weight
    that minimises the remainder for the rounded pair, so later components fit its rounding error and the remainder
    never grows.
    """
    remainder = matrix.clone()
    m, n = matrix.shape
    left, right = matrix.new_zeros(m, rank), matrix.new_zeros(rank, n)
    for i in range(min(rank, m, n)):
        u = remainder @ _normal((n,), matrix, generator)
        for _ in range(iterations):
            u = remainder @ (remainder.T @ (u / u.norm().clamp_min(torch.finfo(u.dtype).tiny)))
        u = rounding(u / u.norm().clamp_min(torch.finfo(u.dtype).tiny))
        v = remainder.T @ u
        length = v.norm()
        if not length > 0:
            break
        v = rounding(v / length)
        weight = (u @ remainder @ v) / (u.square().sum() * v.square().sum())
        remainder.addr_(u, v, alpha=-weight.item())
        left[:, i], right[i] = u * weight, v
    return left, right


def gram_components(
    matrix: Tensor, hessian: Tensor, rank: int, generator: torch.Generator, iterations: int = 2
) -> Tensor:
    """Down factor (r, n) of the best rank-r approximation of `matrix` (m, n) in the norm tr(· H ·ᵀ).

    With any root H = L Lᵀ the optimum is SVD_r(M L) L⁻¹ (QERA, 2410.06040, theorem 1). H is damped by `FACTOR_DAMP`.
    """
    root, _ = cholesky(hessian, FACTOR_DAMP)
    _, _, vh = randomized_svd(matrix @ root, rank, generator, iterations=iterations)
    return torch.linalg.solve_triangular(root, vh, upper=False, left=False)


def correction(
    error: Tensor, hessian: Tensor, rank: int, factor_bits: int, generator: torch.Generator, rows: Tensor | float = 1.0
) -> tuple[Tensor, Factor]:
    """Best low-rank approximation of `error` (m, n) in the Gram norm, with the down factor rounded.

    The down factor is rounded first and the up factor solved for it by least squares, so only the up factor's own
    rounding adds error. `rows` (m, 1) weighs the rows that share the down factor.

    Returns:
        up fp32 (m, r), not rounded (its caller rounds each layer's rows), and the down `Factor` (r, n).
    """
    factor = round_factor(gram_components(error * rows, hessian, rank, generator), factor_bits, 0)
    return fit_up(error, hessian, factor.dense()), factor


def fit_up(error: Tensor, hessian: Tensor, down: Tensor) -> Tensor:
    """Fit the up factor B (m, r) that minimises tr((E - B A) H (E - B A)ᵀ) for a given down factor A (r, n); H is
    damped as in `gram_components`."""
    projected = down @ damped(hessian, FACTOR_DAMP)
    normal = projected @ down.T
    normal.diagonal().add_((1e-6 * normal.diagonal().mean()).clamp_min(torch.finfo(normal.dtype).tiny))
    return torch.linalg.solve(normal, projected @ error.T).T


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers for `like`, on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
