"""The definitions of a format's operators for CPUs, "cpu" and "cpu_experts", plain ATen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lopro_fx.kernels.activation.reference import BITS, GROUPS, round_activation
from lopro_fx.kernels.formats.registry import reference
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.rotate.reference import rotate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def site(
    format: str, x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, bias: Tensor | None, act_bits: int, act_group: int, **rest: Any,
) -> Tensor:  # fmt: skip
    """The format's "site" without prologue and residual, in fp32, rounded once to x's dtype.

    Args:
        format: its name.
        x, perm, signs, block, skip, down, down_scale, bias: as in "site".
        act_bits: 8 or 4 rounds the rotated activation to so many bits for the packed gemm; the low-rank branch takes it
            unrounded. 0 rounds nothing.
        act_group: columns that share a step of the rounding, -1 for all.
        rest: the format's tensors and spec, up and up_scale.

    Returns:
        (..., out_features) of x's dtype.
    """
    wide, latent = _prepared(x, perm, signs, block, skip, down, down_scale, act_bits, act_group)
    bias = None if bias is None else bias.to(torch.float32)
    return reference(format, "linear")(x=wide, bias=bias, latent=latent, **rest).to(x.dtype)


def experts(
    format: str, x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, act_bits: int, act_group: int, **rest: Any,
) -> Tensor:  # fmt: skip
    """The format's "experts" after its `rotate` and `project`, in fp32, rounded once to x's dtype.

    Args:
        format: its name.
        x: (tokens, in_features).
        perm, signs, block, skip, act_bits, act_group: as in `site`, for all experts.
        down, down_scale: int8 or fp16 (rows * rank, in_features) and (rows * rank,), or None.
        rest: all others of "experts".

    Returns:
        (tokens * slots, out_features) of x's dtype.
    """
    wide, latent = _prepared(x, perm, signs, block, skip, down, down_scale, act_bits, act_group)
    return reference(format, "experts")(x=wide, latent=latent, **rest).to(x.dtype)


def require_activation(operator: str, x: Tensor, act_bits: int, act_group: int) -> None:
    """Require what operators for CPUs take.

    Raises:
        ValueError: the dtype of x, act_bits or act_group is another.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"lopro::{operator}: x is {x.dtype}; it takes float32, bfloat16 or float16")
    if act_bits not in (0, *BITS):
        raise ValueError(f"lopro::{operator}: act_bits is {act_bits}; give 0, 4 or 8")
    if act_group not in (0, *GROUPS):
        raise ValueError(f"lopro::{operator}: act_group is {act_group}; give 0, -1, 32, 64 or 128")


def _prepared(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, act_bits: int, act_group: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Activation for the packed gemm, and latent."""
    wide = x.to(torch.float32)
    if perm is not None or block > 1:
        wide = rotate(wide, perm, signs, block, skip)
    latent = None if down is None else project(wide, down, down_scale)
    return round_activation(wide, act_bits, act_group) if act_bits else wide, latent
