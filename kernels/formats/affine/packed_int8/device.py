"""`lopro::round_device` and `lopro::int8_matmul_device`: the Triton form of `lopro::packed_int8`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.activation.reference import clip_for
from lopro_fx.kernels.formats.affine.packed_int8.triton import int8_matmul_kernel, round_kernel
from lopro_fx.kernels.formats.affine.packing.format import WORD, group_count
from lopro_fx.kernels.tiles import WHOLE_ROW, main_width, stand_in

_CHUNK = 256
# Most columns of an integer product; with fewer, sums would be scaled more often.
WIDE = 128
# (tokens, features, warps, stages) by the most tokens that the shape is for; 0 for any number.
_SHAPES = {16: (16, 64, 4, 3), 64: (64, 64, 4, 3), 0: (64, 128, 8, 3)}


def columns(group_size: int, act_group: int) -> int:
    """Columns of one integer product, which divide the groups of both sides."""
    return min([WIDE, *(size for size in (group_size, act_group) if size != -1)])


def round_rows(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, act_bits: int, act_group: int, sum_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate and round an activation.

    Args:
        x: (M, K), contiguous.
        perm, signs, block: as in `lopro::rotate` with `skip` 0.
        act_bits, act_group: as in `lopro::packed_int8`.
        sum_size: columns whose integers are summed, a divisor of the group.

    Returns:
        int8 (M, K), steps fp32 (groups, M), sums of the integers fp32 (ceil(K / sum_size), M): times the step,
        unless a single group's step multiplies the result.
    """
    m, k = x.shape
    size = max(triton.next_power_of_2(k), block, sum_size) if act_group == -1 else act_group
    groups, sums = group_count(k, act_group), -(-k // sum_size)
    chunk = max(block, size, sum_size, _CHUNK if act_group != -1 else 1)
    y = torch.empty_like(x, dtype=torch.int8)
    steps = x.new_empty((groups, m), dtype=torch.float32)
    totals = x.new_empty((sums, m), dtype=torch.float32)
    absent = stand_in(signs, perm, x)
    wrap_triton(round_kernel)[(m * -(-k // chunk),)](
        x, absent if perm is None else perm, absent if signs is None else signs, y, steps, totals,
        m, K=k, TOP=(1 << (act_bits - 1)) - 1, CLIP=clip_for(act_bits, k if act_group == -1 else act_group),
        ACT_GROUP=size, ACT_GROUPS=groups, SUM_SIZE=sum_size, SUM_GROUPS=sums, CHUNK=chunk,
        LOG_BLOCK=block.bit_length() - 1, HAS_PERM=perm is not None, HAS_SIGNS=signs is not None,
        num_warps=8 if chunk > 4096 else 4,
    )  # fmt: skip
    return y, steps, totals


def matmul(
    x: Tensor, steps: Tensor, sums: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
    latent: Tensor | None, up: Tensor | None, up_scale: Tensor | None, bits: int, group_size: int, act_group: int,
    tokens: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Packed gemm with a rounded activation, in int8.

    Args:
        x, steps, sums: from `round_rows` with `sum_size` = `columns(group_size, act_group)`.
        codes, scales, zeros, bias, latent, up, up_scale, bits, group_size: as in `lopro::packed_linear`.
        act_group: as in `round_rows`.
        tokens: tile shape to use: 16, 64, or 0 for any number.
        dtype: of the result and of `latent`.

    Returns:
        (M, N) of `dtype`.
    """
    (m, k), (n, weight_groups) = x.shape, scales.shape
    width = main_width(bits)
    block_m, block_n, warps, stages = _SHAPES[tokens]
    rank = 0 if up is None else up.shape[1]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    y = x.new_empty((m, n), dtype=dtype)
    wrap_triton(int8_matmul_kernel)[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        x, steps, sums, codes, scales, zeros, x if bias is None else bias, x if latent is None else latent,
        x if up is None else up, x if up_scale is None else up_scale, y, m,
        N=n, K=k, R=rank, PART_ROWS=n // parts, WORDS=-(-k // WORD) * width, BITS=bits, WIDTH=width,
        GROUP=WHOLE_ROW if group_size == -1 else group_size, WEIGHT_GROUPS=weight_groups,
        ACT_GROUP=WHOLE_ROW if act_group == -1 else act_group, ACT_GROUPS=steps.shape[0], BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_K=columns(group_size, act_group), BLOCK_R=max(16, triton.next_power_of_2(rank)),
        GROUP_M=8, HAS_BIAS=bias is not None, HAS_SCALES=up_scale is not None, WARPS=warps,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def tile_for(tokens: int | torch.SymInt) -> int:
    """Tile shape for a number of tokens."""
    return next((shape for shape in _SHAPES if shape and dispatch.at_most(tokens, shape)), 0)


# The functions above stay callable as they are, so that launches can be recorded without a device.
round_device = registry.register_triton("round_device", round_rows)
int8_matmul_device = registry.register_triton("int8_matmul_device", matmul)
