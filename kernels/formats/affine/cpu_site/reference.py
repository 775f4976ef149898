"""The definition of `lopro::cpu_site`, plain ATen."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels.activation.reference import group_for
from lopro_fx.kernels.cpu.reference import site
from lopro_fx.kernels.formats.affine.packing.format import group_count


def activation_group(in_features: int, group_size: int, rotated: bool) -> int:
    """Columns that share a step: `group_for`, or the largest power of two up to it that divides the weight's groups."""
    most = group_for(rotated)
    return most if group_count(in_features, group_size) == 1 else min(most, group_size & -group_size)


def require_groups(operator: str, group_size: int) -> None:
    """Require groups that the kernel reads.

    Raises:
        ValueError: group_size is another.
    """
    if group_size != -1 and (group_size <= 0 or group_size % 32):
        raise ValueError(f"lopro::{operator}: group_size is {group_size}; give -1 or a multiple of 32")


def cpu_site(
    x: Tensor,
    perm: Tensor | None,
    signs: Tensor | None,
    block: int,
    skip: int,
    down: Tensor | None,
    down_scale: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
    act_group: int = 0,
) -> Tensor:
    """`lopro::packed_site` in fp32, rounded once to x's dtype; the packed gemm may take rounded activations.

    Args:
        x: (..., in_features) float32, bfloat16 or float16.
        perm, signs, block, skip, down, down_scale, codes, scales, zeros, bias, up, up_scale, bits: as in
            `lopro::packed_site`.
        group_size: -1 or a multiple of 32.
        act_bits: 8 or 4 rounds the rotated activation to so many bits, per token and block of columns, for the packed
            gemm; the low-rank branch takes it unrounded. 0 rounds nothing.
        act_group: columns of a block, 32, 64, 128 or -1 for all; 0 for `activation_group`.

    Returns:
        (..., out_features) of x's dtype.
    """
    return site(
        "affine", x, perm, signs, block, skip, down, down_scale, bias, act_bits,
        act_group or activation_group(x.shape[-1], group_size, block > 1), codes=codes, scales=scales, zeros=zeros,
        up=up, up_scale=up_scale, bits=bits, group_size=group_size,
    )  # fmt: skip
