"""The definition of `lopro::trellis_cpu_experts`, plain ATen."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels.activation.reference import group_for
from lopro_fx.kernels.cpu.reference import experts


def trellis_cpu_experts(
    x: Tensor,
    ids: Tensor,
    slots: int,
    perm: Tensor | None,
    signs: Tensor | None,
    block: int,
    skip: int,
    down: Tensor | None,
    down_scale: Tensor | None,
    scales: Tensor,
    codes: Tensor,
    up: Tensor | None,
    up_scale: Tensor | None,
    cells: Tensor | None,
    core: Tensor | None,
    bits: float,
    columns: int,
    window: int,
    strip: int,
    act_bits: int,
    act_group: int = 0,
) -> Tensor:
    """`lopro::trellis_experts` in fp32, after the rotation and down-projection of its input, rounded once to x's dtype.

    Args:
        x: (tokens, in_features) float32, bfloat16 or float16, not rotated.
        perm, signs, block, skip: as in `lopro::rotate`, for all experts.
        down: int8 or fp16 (rows * rank, in_features), or None.
        down_scale: (rows * rank,), or None for fp16 factors.
        ids, slots, scales, codes, up, up_scale, cells, core, bits, columns, window, strip: as in
            `lopro::trellis_experts`.
        act_bits, act_group: as in `lopro::trellis_cpu`.

    Returns:
        (tokens * slots, out_features) of x's dtype.
    """
    return experts(
        "trellis", x, perm, signs, block, skip, down, down_scale, act_bits,
        act_group or group_for(block > 1), ids=ids, slots=slots,
        scales=scales, codes=codes, up=up, up_scale=up_scale, cells=cells, core=core, bits=bits, columns=columns,
        window=window, strip=strip,
    )  # fmt: skip
