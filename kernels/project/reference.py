"""The definition of `lopro::project`, plain ATen: the low-rank branch's down-projection t = σ ∘ (A x')."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_factor(values: Tensor, scale: Tensor | None, dim: int) -> Tensor:
    """fp32 factor from int8 or fp16 `values` and a scale per row (`dim` 0) or per column (`dim` 1), if any.

    A `scale` (parts, columns) holds one scale per column for each of `parts` runs of equally many rows. With `dim` -1,
    `values` (factors, rows, columns) are factors of experts, and `scale` (factors, columns).
    """
    dense = values.to(torch.float32)
    if scale is None:
        return dense
    if dim == -1:
        return dense * scale.to(torch.float32).unsqueeze(1)
    if scale.dim() == 2:
        return (dense.unflatten(0, (scale.shape[0], -1)) * scale.to(torch.float32).unsqueeze(1)).flatten(0, 1)
    return dense * scale.to(torch.float32).unsqueeze(1 - dim)


def project(x: Tensor, down: Tensor, scale: Tensor | None) -> Tensor:
    """Low-rank down-projection, shared by all Linears of an input.

    Args:
        x: (..., in_features) rotated activation.
        down: int8 or fp16 (rank, in_features).
        scale: fp16 (rank,), or None for fp16 factors.

    Returns:
        (..., rank) of x's dtype.
    """
    return torch.nn.functional.linear(x, dense_factor(down, scale, 0).to(x.dtype))
