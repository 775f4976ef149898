"""`lopro::dense_int8_device`: many tokens of `lopro::packed_int8`, after `dequantize_device`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.formats.affine.dense_int8.triton import dense_int8_kernel
from lopro_fx.kernels.formats.affine.packed_int8.device import WIDE, columns
from lopro_fx.kernels.tiles import WHOLE_ROW

# (tokens, features) of a product, by the products of a program; each has eight warps.
_SHAPES = {1: (128, 128), 2: (64, 256)}
_STAGES = 3


def launch(
    x: Tensor, steps: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, group_size: int, act_group: int, dtype: torch.dtype,
    halves: int,
) -> Tensor:  # fmt: skip
    """`dense_int8.reference.dense_int8` of contiguous tensors; integer sums are exact.

    halves: products of a program, 1 or 2, from `choose_halves`; it decides speed, not the result.
    """
    (m, k), (n, weight_groups) = x.shape, scales.shape
    block_m, block_n = _SHAPES[halves]
    rank = 0 if up is None else up.shape[1]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    y = x.new_empty((m, n), dtype=dtype)
    wrap_triton(dense_int8_kernel)[(triton.cdiv(m, halves * block_m) * triton.cdiv(n, block_n),)](
        x, steps, weight, scales, x if bias is None else bias, x if latent is None else latent,
        x if up is None else up, x if up_scale is None else up_scale, y, m,
        N=n, K=k, R=rank, PART_ROWS=n // parts, GROUP=WHOLE_ROW if group_size == -1 else group_size,
        WEIGHT_GROUPS=weight_groups, ACT_GROUP=WHOLE_ROW if act_group == -1 else act_group, ACT_GROUPS=steps.shape[0],
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=columns(group_size, act_group),
        BLOCK_R=max(16, triton.next_power_of_2(rank)), GROUP_M=8, HALVES=halves,
        HAS_BIAS=bias is not None, HAS_SCALES=up_scale is not None, num_warps=8 * halves, num_stages=_STAGES,
    )  # fmt: skip
    return y


def choose_halves(device: torch.device, group_size: int, act_group: int, dtype: torch.dtype) -> int:
    """Two where their sums fit the registers, to read less from L2: on Hopper, whose operands need no registers."""
    fits = columns(group_size, act_group) == WIDE and act_group == -1 and dtype != torch.float32
    return 2 if fits and dispatch.capability(device) == (9, 0) else 1


# `launch` stays callable as it is, so that launches can be recorded without a device.
dense_int8_device = registry.register_triton("dense_int8_device", launch)
