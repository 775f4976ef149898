"""The definition of `lopro::packed_int8`, plain ATen: activations rounded to integers, then the packed gemm."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.activation.reference import round_activation
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.rotate.reference import rotate


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
    rounded = round_activation(x.to(torch.float32), act_bits, act_group)
    wide = None if bias is None else bias.to(torch.float32)
    low = None if latent is None else latent.to(torch.float32)
    linear = reference("affine", "linear")
    return linear(rounded, codes, scales, zeros, wide, low, up, up_scale, bits, group_size).to(dtype)
