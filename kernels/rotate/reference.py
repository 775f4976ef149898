"""The definition of `lopro::rotate`, plain ATen: x' = Tᵀ x with T = P S D (LoPRo section 3.3, equations 5-8).

`P` gathers columns by a permutation, `S` flips signs, and `D = diag(I, H, H, …)` leaves the first `skip` columns
unrotated and applies a normalised Sylvester-Hadamard matrix to each block of `block` columns after them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard_signs(size: int, device: torch.device | None = None) -> Tensor:
    """Unnormalised Sylvester-Hadamard matrix, int32 (size, size): entry (i, j) is (-1)^popcount(i & j)."""
    index = torch.arange(size, dtype=torch.int32, device=device)
    bits = index.unsqueeze(1) & index
    shift = 16
    while shift:
        bits = bits ^ (bits >> shift)
        shift //= 2
    return 1 - 2 * (bits & 1)


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Normalised Hadamard transform of each run of `block` columns of (..., n); its own inverse.

    H of size a*c is the Kronecker product of those of size a and c, so two small matrix products do it.
    """
    if block == 1:
        return x
    rows = 1 << (block.bit_length() // 2)
    cols = block // rows
    y = x.unflatten(-1, (-1, rows, cols))
    if cols > 1:
        y = y @ hadamard_signs(cols, x.device).to(x.dtype)
    y = hadamard_signs(rows, x.device).to(x.dtype) @ y
    return (y * (1.0 / math.sqrt(block))).flatten(-3)


def unpack_signs(signs: Tensor, count: int) -> Tensor:
    """uint8 (ceil(count / 8),) bit field, lowest bit first, to int32 (count,) of +1 and -1; a set bit is -1."""
    shifts = torch.arange(8, dtype=torch.int32, device=signs.device)
    bits = (signs.to(torch.int32).unsqueeze(-1) >> shifts) & 1
    return 1 - 2 * bits.flatten()[:count]


def pack_signs(signs: Tensor) -> Tensor:
    """Inverse of `unpack_signs`: (n,) of +1 and -1 to uint8 (ceil(n / 8),)."""
    bits = torch.nn.functional.pad((signs < 0).to(torch.int32), (0, -signs.numel() % 8))
    shifts = torch.arange(8, dtype=torch.int32, device=signs.device)
    return (bits.view(-1, 8) << shifts).sum(-1).to(torch.uint8)


def rotate(x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int) -> Tensor:
    """x' = Tᵀ x over the last dimension.

    Args:
        x: (..., n) floating point; narrower types are computed in fp32 and rounded once.
        perm: int16 or int32 (n,), or None: column j of the result comes from column perm[j] (a gather).
        signs: uint8 (ceil(n / 8),) packed signs over all n columns, or None; those of the first `skip` are unused.
        block: Hadamard size, a power of two that divides n - skip; 1 leaves everything unrotated.
        skip: leading columns that stay unrotated.

    Returns:
        A tensor of x's shape and dtype.
    """
    if perm is not None:
        x = x.index_select(-1, perm.to(torch.int32))
    if block == 1:
        return x.clone() if perm is None else x
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    tail = wide[..., skip:]
    if signs is not None:
        tail = tail * unpack_signs(signs, x.shape[-1])[skip:].to(tail.dtype)
    tail = block_hadamard(tail, block).to(x.dtype)
    return torch.cat([x[..., :skip], tail], -1) if skip else tail


def unrotate(x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int) -> Tensor:
    """Inverse of `rotate`, for weights: W' T ᵀ = W."""
    if block > 1:
        tail = block_hadamard(x[..., skip:], block)
        if signs is not None:
            tail = tail * unpack_signs(signs, x.shape[-1])[skip:].to(tail.dtype)
        x = torch.cat([x[..., :skip], tail], -1)
    if perm is None:
        return x
    return torch.empty_like(x).index_copy_(-1, perm.to(torch.int64), x)
