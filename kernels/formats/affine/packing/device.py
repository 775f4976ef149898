"""`lopro::dequantize_device`: the Triton form of `packing.format.dequantize`, with a low-rank branch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import registry
from lopro_fx.kernels.formats.affine.packing.format import WORD
from lopro_fx.kernels.formats.affine.packing.triton import dequantize_kernel
from lopro_fx.kernels.tiles import WHOLE_ROW, main_width

_BLOCK_N, _BLOCK_K, _WARPS = 64, 128, 4


def launch(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int, dtype: torch.dtype,
    up: Tensor | None = None, up_scale: Tensor | None = None, down: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dequantise to Q̂, or to Q̂ + B A, so that many tokens need one gemm.

    Args:
        codes, scales, zeros, bits, group_size, in_features, dtype: as in `packing.format.dequantize`; with torch.int8,
            as in `dense_int8.reference.doubled`.
        up, up_scale: B, as in `lopro::packed_linear`, rounded to `dtype`; or None.
        down, down_scale: A, as in `lopro::project`, with `up`.

    Returns:
        (out_features, in_features) of `dtype`.
    """
    n, weight_groups = scales.shape
    width, rank = main_width(bits), 0 if up is None else up.shape[1]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    y = codes.new_empty((n, in_features), dtype=dtype)
    wrap_triton(dequantize_kernel)[(triton.cdiv(in_features, _BLOCK_K), triton.cdiv(n, _BLOCK_N))](
        codes, scales, zeros, codes if up is None else up, codes if up_scale is None else up_scale,
        codes if down is None else down, codes if down_scale is None else down_scale, y,
        N=n, K=in_features, R=rank, PART_ROWS=n // parts, WORDS=-(-in_features // WORD) * width, BITS=bits, WIDTH=width,
        GROUP=WHOLE_ROW if group_size == -1 else group_size, WEIGHT_GROUPS=weight_groups, BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K, BLOCK_R=max(16, triton.next_power_of_2(rank)), HAS_UP_SCALE=up_scale is not None,
        HAS_DOWN_SCALE=down_scale is not None, DOUBLED=dtype == torch.int8,
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=_WARPS,
    )  # fmt: skip
    return y


# The function above stays callable as it is, so that launches can be recorded without a device.
dequantize_device = registry.register_triton("dequantize_device", launch)
