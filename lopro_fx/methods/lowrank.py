"""Low-rank factors: R1-sketch, block randomised SVD, the optimal correction in the Gram norm, and int8 rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.kernels.project.reference import dense_factor
from lopro_fx.methods.gptq import cholesky


@dataclass(frozen=True)
class Factor:
    """A stored factor: int8 codes with an fp16 scale per component, or fp16 values and no scale.

    `values` is (rank, n) for the down and (m, rank) for the up factor; `dim` is the component dimension.
    """

    values: Tensor
    scale: Tensor | None
    dim: int

    def dense(self) -> Tensor:
        """fp32, exactly what the operators compute with."""
        return dense_factor(self.values, self.scale, self.dim)


def round_factor(factor: Tensor, bits: int, dim: int) -> Factor:
    """Round a factor to `bits` = 8 (int8, one fp16 scale a component) or 16 (fp16).

    A scale that an int8 component needs outside fp16's range is clamped to it, so components below it become zeros.
    """
    if bits == 16:
        return Factor(factor.clamp(-65504, 65504).to(torch.float16), None, dim)
    amax = factor.abs().amax(1 - dim) if factor.numel() else factor.new_zeros(factor.shape[dim])
    scale = (amax / 127).clamp(2.0**-24, 65504).to(torch.float16)
    codes = (factor / scale.to(torch.float32).unsqueeze(1 - dim)).round_().clamp_(-127, 127)
    return Factor(codes.to(torch.int8), scale, dim)


def randomized_svd(
    matrix: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, iterations: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading `rank` singular triplets (m, r), (r,), (r, n) by block subspace iteration (Halko et al. 0909.4061, 4.4).

    Needs `2 * iterations + 2` passes over the matrix, each one matrix product of width rank + oversample.
    """
    m, n = matrix.shape
    width = min(rank + oversample, m, n)
    basis = matrix @ torch.randn(n, width, generator=generator, dtype=matrix.dtype)
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

    Each component is found by power iteration on the current remainder, rounded, and subtracted with the weight that
    minimises the remainder for the rounded pair, so its rounding error is fitted again by later components and the
    remainder never grows.
    """
    remainder = matrix.clone()
    m, n = matrix.shape
    left, right = matrix.new_zeros(m, rank), matrix.new_zeros(rank, n)
    for i in range(min(rank, m, n)):
        u = remainder @ torch.randn(n, generator=generator, dtype=matrix.dtype)
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
    matrix: Tensor, hessian: Tensor, rank: int, generator: torch.Generator, iterations: int = 2, damp: float = 0.1
) -> Tensor:
    """Down factor (r, n) of the best rank-r approximation of `matrix` (m, n) in the norm tr(· H ·ᵀ).

    With any root H = L Lᵀ the optimum is SVD_r(M L) L⁻¹ (QERA, 2410.06040, theorem 1). The damping is ten times that of
    the rounding: L⁻¹ grows without bound in directions that calibration hardly saw, and other text does see them.
    """
    root, _ = cholesky(hessian, damp)
    _, _, vh = randomized_svd(matrix @ root, rank, generator, iterations=iterations)
    return torch.linalg.solve_triangular(root, vh, upper=False, left=False)


def correction(
    error: Tensor, hessian: Tensor, rank: int, factor_bits: int, generator: torch.Generator, rows: Tensor | float = 1.0
) -> tuple[Tensor, Factor]:
    """Best low-rank approximation of `error` (m, n) in the Gram norm, with the down factor rounded.

    The down factor is rounded first and the up factor solved for it by least squares, so only the up factor's own
    rounding is left to pay. `rows` (m, 1) scales the rows among which the down factor is shared.

    Returns:
        up fp32 (m, r), not rounded (its caller rounds each site's rows), and the down `Factor` (r, n).
    """
    factor = round_factor(gram_components(error * rows, hessian, rank, generator), factor_bits, 0)
    return fit_up(error, hessian, factor.dense()), factor


def fit_up(error: Tensor, hessian: Tensor, down: Tensor) -> Tensor:
    """Up factor (m, r) that minimises tr((E - B A) H (E - B A)ᵀ) for a given down factor A (r, n)."""
    projected = down @ hessian
    normal = projected @ down.T
    normal.diagonal().add_((1e-6 * normal.diagonal().mean()).clamp_min(torch.finfo(normal.dtype).tiny))
    return torch.linalg.solve(normal, projected @ error.T).T
