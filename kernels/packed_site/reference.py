"""The definition of `lopro::packed_site`: rotation, low-rank branch and packed product of one Linear."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels.packed_linear.reference import packed_linear
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.rotate.reference import rotate


def packed_site(
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
) -> Tensor:
    """`packed_linear` of `rotate` and `project`, where nothing else reads them.

    Args:
        x: (..., in_features), not rotated.
        perm, signs, block, skip: as in `lopro::rotate`; no permutation and a block of 1 leave x as it is.
        down, down_scale: as in `lopro::project`, or None at rank 0.
        codes, scales, zeros, bias, up, up_scale, bits, group_size: as in `lopro::packed_linear`.

    Returns:
        (..., out_features) of x's dtype.
    """
    if perm is not None or block > 1:
        x = rotate(x, perm, signs, block, skip)
    latent = None if down is None else project(x, down, down_scale)
    return packed_linear(x, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size)
