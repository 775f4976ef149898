"""Choice of the parts of an orthogonal transform T = P S D for Linears that share an input."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.rotate.reference import pack_signs

# Variance of the blocks' relative energies, beyond that of random weights, from which on they are mixed. In SmolLM2 it
# is 0.04 to 0.45 for weights that read attention's output, and at most 0.026 for all others.
_SPREAD = 0.03


def largest_block(width: int, limit: int) -> int:
    """Largest power of two that divides `width` and is at most `limit`; 1 when `width` is 0 or odd."""
    block = 1
    while width and width % (block * 2) == 0 and block * 2 <= limit:
        block *= 2
    return block


def importance_order(residual: Tensor, hessian: Tensor) -> Tensor:
    """Columns by falling importance, int64 (n,); dead columns (H_jj = 0) last.

    The score is the released code's log-compressed form of LoPRo equation 5, mean|R_j| / (log2(H_jj / min H) + 1),
    smallest first. It does not change when H or R is multiplied by a positive number.
    """
    diagonal = hessian.diagonal().to(torch.float64)
    alive = diagonal > 0
    floor = diagonal[alive].min() if alive.any() else torch.ones((), dtype=torch.float64, device=diagonal.device)
    spread = torch.log2(torch.where(alive, diagonal, floor) / floor) + 1
    score = residual.abs().mean(0).to(torch.float64) / spread
    score = torch.where(alive, score, torch.full_like(score, torch.inf))
    return torch.argsort(score, stable=True)


def energy_order(hessian: Tensor) -> Tensor:
    """Act-order: columns by falling diag(H), int64 (n,)."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def mixing_order(weight: Tensor, block: int, generator: torch.Generator) -> Tensor | None:
    """Random order of columns where the energy of a row differs from one Hadamard block to the next; int64 (n,).

    A rotation mixes the columns of a block alone. Blocks that differ (those of the heads, in the weight that reads
    attention's output) are mixed by a permutation first; None where they differ as random weights would.
    """
    width = weight.shape[1]
    if not 1 < block < width:
        return None
    energy = weight.square().unflatten(1, (-1, block)).mean(2)
    row = energy.mean(1, keepdim=True)
    alive = row.squeeze(1) > 0
    if not alive.any():
        return None
    spread = (energy[alive] / row[alive]).var(1, correction=0).mean().item()
    if spread <= 2 / block + _SPREAD:
        return None
    return torch.randperm(width, generator=generator, dtype=torch.int64, device="cpu").to(weight.device)


def as_index(order: Tensor) -> Tensor:
    """Cast a permutation to the narrowest dtype that holds it: int16 up to 32768 columns, then int32."""
    return order.to(torch.int16 if order.numel() <= 2**15 else torch.int32)


def random_signs(width: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Packed random signs for `width` columns; drawn on the CPU, so that every device gets the same."""
    drawn = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int64, device="cpu")
    return pack_signs(drawn.to(device) * 2 - 1)
