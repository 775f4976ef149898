"""The definition of `lopro::packed_linear`, plain ATen: y = Q̂ x' + B t + b (LoPRo equation 8, factors rotated)."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.packing.format import dequantize
from lopro_fx.kernels.project.reference import dense_factor


def packed_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    latent: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """Matrix product with a packed weight.

    Args:
        x: (..., in_features) rotated activation.
        codes, scales, zeros: the packed weight, see `kernels/packing/format.py`.
        bias: (out_features,) or None.
        latent: (..., rank), the output of `lopro::project`, or None.
        up: int8 or fp16 (out_features, rank), with `latent`.
        up_scale: fp16 (rank,), or (parts, rank) where `parts` runs of equally many rows of `up` have scales of their
            own (merged Linears), or None for fp16 factors.
        bits: 2, 3, 4 or 8.
        group_size: input columns per scale; -1 is the whole row.

    Returns:
        (..., out_features) of x's dtype.
    """
    weight = dequantize(codes, scales, zeros, bits, group_size, x.shape[-1], x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if latent is not None and up is not None:
        y = y + torch.nn.functional.linear(latent, dense_factor(up, up_scale, 1).to(x.dtype))
    return y
