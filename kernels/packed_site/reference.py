"""The definition of `lopro::packed_site`: rotation, low-rank branch and packed product of one Linear."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels.packed_linear.reference import packed_linear
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.prologue.reference import prologue
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
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """`packed_linear` of `rotate` and `project`, where nothing else reads them, with what stands around it in a model.

    Args:
        x: (..., in_features), not rotated.
        perm, signs, block, skip: as in `lopro::rotate`; no permutation and a block of 1 leave x as it is.
        down, down_scale: as in `lopro::project`, or None at rank 0.
        codes, scales, zeros, bias, up, up_scale, bits, group_size: as in `lopro::packed_linear`.
        norm, eps, gate, activation: applied to x first, as in `prologue/reference.py`.
        residual: (..., out_features), added to the result, or None.

    Returns:
        (..., out_features) of x's dtype.
    """
    x, perm = prologue(x, perm, norm, eps, gate, activation)
    if perm is not None or block > 1:
        x = rotate(x, perm, signs, block, skip)
    latent = None if down is None else project(x, down, down_scale)
    y = packed_linear(x, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size)
    return y if residual is None else y + residual
