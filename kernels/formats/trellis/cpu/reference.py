"""The definition of `lopro::trellis_cpu`, plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels.activation.reference import group_for, round_activation
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.rotate.reference import rotate


def trellis_cpu(
    x: Tensor,
    perm: Tensor | None,
    signs: Tensor | None,
    block: int,
    skip: int,
    down: Tensor | None,
    down_scale: Tensor | None,
    scales: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    bits: float,
    columns: int,
    window: int,
    strip: int,
    act_bits: int,
) -> Tensor:
    """`lopro::trellis_site` in fp32, rounded once to x's dtype; the packed gemm may take rounded activations.

    Args:
        x: (..., in_features) float32, bfloat16 or float16.
        perm, signs, block, skip, down, down_scale, scales, codes, bias, up, up_scale, bits, columns, window, strip: as
            in `lopro::trellis_site`.
        act_bits: 8 rounds the rotated activation to int8 per token and block of columns for the packed gemm; the
            low-rank branch takes it unrounded. 0 rounds nothing.

    Returns:
        (..., out_features) of x's dtype.
    """
    wide = x.to(torch.float32)
    if perm is not None or block > 1:
        wide = rotate(wide, perm, signs, block, skip)
    latent = None if down is None else project(wide, down, down_scale)
    if act_bits:
        wide = round_activation(wide, act_bits, group_for(block > 1))
    bias = None if bias is None else bias.to(torch.float32)
    linear = reference("trellis", "linear")
    return linear(wide, scales, codes, bias, latent, up, up_scale, bits, columns, window, strip).to(x.dtype)
