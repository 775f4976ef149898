"""The definition of `lopro::trellis_cpu`, plain ATen."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels.activation.reference import group_for
from lopro_fx.kernels.cpu.reference import site


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
    act_group: int = 0,
) -> Tensor:
    """`lopro::trellis_site` in fp32, rounded once to x's dtype; the packed gemm may take rounded activations.

    Args:
        x: (..., in_features) float32, bfloat16 or float16.
        perm, signs, block, skip, down, down_scale, scales, codes, bias, up, up_scale, bits, columns, window, strip: as
            in `lopro::trellis_site`.
        act_bits: 8 or 4 rounds the rotated activation to so many bits, per token and block of columns, for the packed
            gemm; the low-rank branch takes it unrounded. 0 rounds nothing.
        act_group: columns of a block, 32, 64, 128 or -1 for all; 0 for `group_for`.

    Returns:
        (..., out_features) of x's dtype.
    """
    return site(
        "trellis", x, perm, signs, block, skip, down, down_scale, bias, act_bits,
        act_group or group_for(block > 1), scales=scales,
        codes=codes, up=up, up_scale=up_scale, bits=bits, columns=columns, window=window, strip=strip,
    )  # fmt: skip
