"""The definition of `lopro::packed_int8`, plain ATen: activations rounded to integers, then the packed product."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.rotate.reference import rotate


def round_activation(x: Tensor, act_bits: int, act_group: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers of x (..., K), with one step for each run of `act_group` columns (-1: one for each token).

    Returns:
        int8 (..., K) in [-(2^(b-1) - 1), 2^(b-1) - 1], and the step fp32 (..., groups).
    """
    k = x.shape[-1]
    size = k if act_group == -1 else act_group
    parts = torch.nn.functional.pad(x.to(torch.float32), (0, -k % size)).unflatten(-1, (-1, size))
    top = parts.abs().amax(-1)
    step = torch.where(top > 0, top, torch.ones_like(top)) * (1.0 / ((1 << (act_bits - 1)) - 1))
    codes = torch.floor(parts / step.unsqueeze(-1) + 0.5).to(torch.int8)
    return codes.flatten(-2)[..., :k], step


def packed_int8(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, codes: Tensor, scales: Tensor,
    zeros: Tensor, bias: Tensor | None, latent: Tensor | None, up: Tensor | None, up_scale: Tensor | None, bits: int,
    group_size: int, act_bits: int, act_group: int,
) -> Tensor:  # fmt: skip
    """Rotate x, round it, and multiply by a packed weight.

    Args:
        x: (..., in_features), not rotated.
        perm, signs, block, skip: as in `lopro::rotate`.
        codes, scales, zeros, bias, latent, up, up_scale, bits, group_size: as in `lopro::packed_linear`.
        act_bits: 4 or 8, of an activation's integer.
        act_group: columns that share a step; a multiple or divisor of `group_size`, or -1 for the whole token.

    Returns:
        (..., out_features) of x's dtype.
    """
    dtype = x.dtype
    if perm is not None or block > 1:
        x = rotate(x.to(torch.float32), perm, signs, block, skip)
    integers, step = round_activation(x, act_bits, act_group)
    k = integers.shape[-1]
    size = k if act_group == -1 else act_group
    rounded = integers.to(torch.float32) * step.repeat_interleave(size, -1)[..., :k]
    wide = None if bias is None else bias.to(torch.float32)
    low = None if latent is None else latent.to(torch.float32)
    return reference("affine", "linear")(rounded, codes, scales, zeros, wide, low, up, up_scale, bits, group_size).to(
        dtype
    )
