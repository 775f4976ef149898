"""The definition of a format's "cpu" operator, plain ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.activation.reference import round_activation
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.rotate.reference import rotate


def site(
    format: str, x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, bias: Tensor | None, act_bits: int, act_group: int, **rest: Any,
) -> Tensor:  # fmt: skip
    """The format's "site" without prologue and residual, in fp32, rounded once to x's dtype.

    Args:
        format: its name.
        x, perm, signs, block, skip, down, down_scale, bias: as in "site".
        act_bits: 8 rounds the rotated activation to int8 for the packed gemm; the low-rank branch takes it unrounded. 0
            rounds nothing.
        act_group: columns that share a step of the rounding.
        rest: the format's tensors and spec, up and up_scale.

    Returns:
        (..., out_features) of x's dtype.
    """
    wide = x.to(torch.float32)
    if perm is not None or block > 1:
        wide = rotate(wide, perm, signs, block, skip)
    latent = None if down is None else project(wide, down, down_scale)
    if act_bits:
        wide = round_activation(wide, act_bits, act_group)
    bias = None if bias is None else bias.to(torch.float32)
    return reference(format, "linear")(x=wide, bias=bias, latent=latent, **rest).to(x.dtype)
