"""Low-rank factors: R1-sketch, block subspace iteration, the optimal correction in the Gram norm, and int8 rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lopro_fx.kernels.formats.scales import rounded_scale
from lopro_fx.layer import Factor
from lopro_fx.methods.ldlq import damping
from lopro_fx.methods.prior import FACTOR_DAMP
from lopro_fx.methods.units import divided

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


def r1_sketch(
    matrix: Tensor,
    rank: int,
    generator: torch.Generator,
    iterations: int = 8,
    rounding: Callable[[Tensor], Tensor] = lambda v: v,
) -> tuple[Tensor, Tensor]:
    """Rank-one deflation (LoPRo equations 10-12): left (m, r) and right (r, n) with left @ right close to the matrix.

    See `r1_components`. Components past the rank of the matrix are zero.
    """
    m, n = matrix.shape
    left, right = matrix.new_zeros(m, rank), matrix.new_zeros(rank, n)
    for i, (u, v) in zip(range(rank), r1_components(matrix, generator, iterations, rounding), strict=False):
        left[:, i], right[i] = u, v
    return left, right


def r1_components(
    matrix: Tensor,
    generator: torch.Generator,
    iterations: int = 8,
    rounding: Callable[[Tensor], Tensor] = lambda v: v,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the components u (m,), v (n,) of a rank-one deflation, until nothing of the matrix (m, n) is left.

    Each component is found by power iteration on the current remainder and rounded. It is subtracted with the weight
    that minimises the remainder for the rounded pair, so later components fit its rounding error and the remainder
    never grows. Without rounding, v is of length 1 and u is the remainder times v.
    """
    remainder = matrix.clone()
    m, n = matrix.shape
    for _ in range(min(m, n)):
        u = remainder @ _normal((n,), matrix, generator)
        for _ in range(iterations):
            u = remainder @ (remainder.T @ (u / u.norm().clamp_min(torch.finfo(u.dtype).tiny)))
        u = rounding(u / u.norm().clamp_min(torch.finfo(u.dtype).tiny))
        v = remainder.T @ u
        length = v.norm()
        if not length > 0:
            return
        v = rounding(v / length)
        weight = (u @ remainder @ v) / (u.square().sum() * v.square().sum())
        remainder.addr_(u, v, alpha=-weight.item())
        yield u * weight, v


def block_components(
    matrix: Tensor, hessian: Tensor, generator: torch.Generator, iterations: int = 2, width: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield components u (m,), v (n,) of the best approximations of the matrix (m, n) in the norm of the damped H.

    `gram_components` finds `width` of them at once in the current remainder, until nothing is left.
    """
    remainder, most = matrix.clone(), min(matrix.shape)
    for first in range(0, most, width):
        down = gram_components(remainder, hessian, min(width, most - first), generator, iterations)
        down = down[down.any(1)]
        if not len(down):
            return
        up = fit_up(remainder, hessian, down)
        yield from zip(up.T, down, strict=True)
        remainder.addmm_(up, down, alpha=-1)


def column_scale(magnitude: Tensor, power: float) -> Tensor:
    """Scale s_j = t_j / sqrt(max t * min t) fp32 (n,), with t_j = E|x_j|^power; max s is 1 / min s.

    With it, columns of large activations are fitted more closely: LoPRo equation 4, FLRQ equations 10 and 11. t is
    floored at 1e-8 of its maximum, so dead columns neither divide by zero nor stretch the range. The released code's
    floor is absolute and depends on the model's dtype.
    """
    raised = magnitude.to(torch.float64).pow(power)
    raised = raised.clamp_min(max(raised.max().item() * 1e-8, torch.finfo(torch.float64).tiny ** 0.5))
    return (raised / (raised.max() * raised.min()).sqrt()).to(torch.float32)


def factor_bytes(rank: int, rows: Sequence[int], in_features: int, bits: int) -> int:
    """Bytes of a down factor and of an up factor of each of the layers with `rows` rows, see `round_factor`."""
    scales = 2 * (len(rows) + 1) if bits == 8 else 0
    return rank * ((sum(rows) + in_features) * bits // 8 + scales)


@dataclass(frozen=True)
class Branch:
    """Low-rank branch of a unit with rounded factors: the shared down factor (r, n), and an up factor a layer."""

    down: Factor
    ups: tuple[Factor, ...]

    def dense(self, share: Tensor) -> Tensor:
        """Multiply the factors to (m, n), in units of the rows; `share` (m, 1) takes those to one unit."""
        return divided(torch.cat([up.dense() for up in self.ups]), share) @ self.down.dense()


def round_branch(up: Tensor, down: Factor, share: Tensor, rows: Sequence[int], bits: int) -> Branch:
    """Round an up factor (m, r) in units of the rows, each layer's `rows` for themselves."""
    return Branch(down, tuple(round_factor(part, bits, 1) for part in (up * share).split(list(rows))))


def gram_components(
    matrix: Tensor,
    hessian: Tensor | None,
    rank: int,
    generator: torch.Generator,
    iterations: int = 2,
    oversample: int = 8,
) -> Tensor:
    """Down factor A (r, n) of the best rank-r approximation of `matrix` M (m, n) in the norm tr(· H ·ᵀ).

    With any root H = L Lᵀ the optimum is SVD_r(M L) L⁻¹ (QERA, 2410.06040, theorem 1), which is U Uᵀ M for the leading
    eigenvectors U of M H Mᵀ: no root is formed. They are found by block subspace iteration (Halko et al. 0909.4061,
    4.4), in products of width r + `oversample`. H is damped by `FACTOR_DAMP`; without one it is the identity.

    Returns:
        A, with A H Aᵀ the identity, but for rows of zeros past the rank of `matrix`.
    """
    m, n = matrix.shape
    ridge = None if hessian is None else damping(hessian, FACTOR_DAMP)

    def moved(x: Tensor) -> Tensor:
        return x if hessian is None or ridge is None else torch.addmm(ridge * x, hessian, x)

    basis = matrix @ moved(_normal((n, min(rank + oversample, m, n)), matrix, generator))
    for _ in range(iterations):
        basis = matrix @ moved(matrix.T @ torch.linalg.qr(basis).Q)
    inner = torch.linalg.qr(basis).Q.T @ matrix
    squares, vectors = torch.linalg.eigh(inner @ moved(inner.T))
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    # Below, eigenvalues are rounding errors.
    alive = squares > squares[:1] * torch.finfo(squares.dtype).eps
    length = torch.where(alive, squares, 1.0).sqrt()
    return torch.where(alive, vectors / length, 0.0).T @ inner


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
    projected = down @ hessian + damping(hessian, FACTOR_DAMP) * down
    normal = projected @ down.T
    normal.diagonal().add_((1e-6 * normal.diagonal().mean()).clamp_min(torch.finfo(normal.dtype).tiny))
    return torch.linalg.solve(normal, projected @ error.T).T


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers for `like`, on the CPU, so that every device gets the same."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)
