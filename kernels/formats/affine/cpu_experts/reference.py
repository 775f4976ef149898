"""The definition of `lopro::cpu_experts`, plain ATen."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels.cpu.reference import experts
from lopro_fx.kernels.formats.affine.cpu_site.reference import activation_group


def cpu_experts(
    x: Tensor,
    ids: Tensor,
    slots: int,
    perm: Tensor | None,
    signs: Tensor | None,
    block: int,
    skip: int,
    down: Tensor | None,
    down_scale: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    cells: Tensor | None,
    core: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
    act_group: int = 0,
) -> Tensor:
    """`lopro::packed_experts` in fp32, after the rotation and down-projection of its input, rounded once to x's dtype.

    Args:
        x: (tokens, in_features) float32, bfloat16 or float16, not rotated.
        perm, signs, block, skip: as in `lopro::rotate`, for all experts.
        down: int8 or fp16 (rows * rank, in_features), or None.
        down_scale: (rows * rank,), or None for fp16 factors.
        ids, slots, codes, scales, zeros, up, up_scale, cells, core, bits: as in `lopro::packed_experts`.
        group_size, act_bits, act_group: as in `lopro::cpu_site`.

    Returns:
        (tokens * slots, out_features) of x's dtype.
    """
    return experts(
        "affine", x, perm, signs, block, skip, down, down_scale, act_bits,
        act_group or activation_group(x.shape[-1], group_size, block > 1), ids=ids, slots=slots, codes=codes,
        scales=scales, zeros=zeros, up=up, up_scale=up_scale, cells=cells, core=core, bits=bits, group_size=group_size,
    )  # fmt: skip
