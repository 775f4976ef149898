"""`lopro::trellis_dequantize`: the Triton form of `Trellis.dequantize`, with a low-rank branch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import registry
from lopro_fx.kernels.formats.trellis.code import strip_rows
from lopro_fx.kernels.formats.trellis.packing.triton import dequantize_kernel
from lopro_fx.kernels.tiles import NATIVE

# Rows, columns and warps of a program; were quads of rows as many as strings, Triton would give loads the layout of the
# stores, columns in lanes.
_BLOCK_N, _BLOCK_K, _WARPS = 64, 64, 4


def launch(
    scales: Tensor, codes: Tensor, step: int, columns: int, window: int, strip: int, in_features: int,
    dtype: torch.dtype, up: Tensor | None = None, up_scale: Tensor | None = None, down: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dequantise to Q̂, or to Q̂ + B A, so that many tokens need one gemm.

    Args:
        scales, codes: fp16 or fp32 (out_features,) and int32 (words,), as in `code.py`.
        step: new bits of a step.
        columns, window, strip: the spec of the format.
        in_features, dtype: of the result.
        up, up_scale: B, as in `definition.linear`, rounded to `dtype`; or None.
        down, down_scale: A, as in `definition.site`, with `up`.

    Returns:
        (out_features, in_features) of `dtype`.
    """
    n, pairs = scales.shape[0], triton.cdiv(in_features, columns)
    strips = strip_rows(n, strip)
    rank = 0 if up is None else up.shape[1]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    y = codes.new_empty((n, in_features), dtype=dtype)
    wrap_triton(dequantize_kernel)[(triton.cdiv(in_features, _BLOCK_K), triton.cdiv(n, _BLOCK_N))](
        scales, codes, codes if up is None else up, codes if up_scale is None else up_scale,
        codes if down is None else down, codes if down_scale is None else down_scale, y,
        N=n, K=in_features, R=rank, PART_ROWS=n // parts, PAIRS=pairs, STEP=step, COLUMNS=columns, WINDOW=window,
        STRIP=strips[0], STRIPS=len(strips), BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        BLOCK_R=max(16, triton.next_power_of_2(rank)), HAS_UP_SCALE=up_scale is not None,
        HAS_DOWN_SCALE=down_scale is not None, PRECISION="ieee" if dtype == torch.float32 else "tf32", NATIVE=NATIVE,
        num_warps=_WARPS,
    )  # fmt: skip
    return y


# The function above stays callable as it is, so that launches can be recorded without a device.
trellis_dequantize = registry.register_triton("trellis_dequantize", launch)
