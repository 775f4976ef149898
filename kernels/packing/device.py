"""`lopro::dequantize_device`: the Triton form of `packing.format.dequantize`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from lopro_fx.kernels.packing.format import WORD
from lopro_fx.kernels.packing.triton import dequantize_kernel
from lopro_fx.kernels.tiles import WHOLE_ROW, main_width

_BLOCK_N, _BLOCK_K = 16, 128


def launch(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Arguments and result as `packing.format.dequantize`."""
    n, weight_groups = scales.shape
    width = main_width(bits)
    y = codes.new_empty((n, in_features), dtype=dtype)
    wrap_triton(dequantize_kernel)[(triton.cdiv(n, _BLOCK_N), triton.cdiv(in_features, _BLOCK_K))](
        codes, scales, zeros, y, N=n, K=in_features, WORDS=-(-in_features // WORD) * width, BITS=bits, WIDTH=width,
        GROUP=WHOLE_ROW if group_size == -1 else group_size, WEIGHT_GROUPS=weight_groups, BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
    )  # fmt: skip
    return y


# The function above stays callable as it is, which is how launches are recorded without a device.
dequantize_device = triton_op("lopro::dequantize_device", launch, mutates_args={})
