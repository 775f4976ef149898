"""Packed weight to dense, in one pass: 2 to 8 bits read, 16 or 32 written."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.tiles import by_column, load_codes, load_zeros


@triton.jit
def dequantize_kernel(
    codes_ptr,  # (N, ROW) int32
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # packed (N, WEIGHT_GROUPS)
    y_ptr,  # (N, K)
    N: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows by BLOCK_K columns."""
    first, start = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    codes_ptr += first.to(tl.int64) * (WORDS * BITS // WIDTH)
    y_ptr += first.to(tl.int64) * K
    rows = tl.arange(0, BLOCK_N)
    n, k = first + rows, start + tl.arange(0, BLOCK_K)
    inside = n < N
    codes = load_codes(codes_ptr, rows, start, inside, WORDS, BITS, WIDTH, BLOCK_N, BLOCK_K)
    BLOCK_G: tl.constexpr = BLOCK_K // GROUP if GROUP < BLOCK_K else 1
    g = start // GROUP + tl.arange(0, BLOCK_G)
    g_inside = inside[:, None] & (g < WEIGHT_GROUPS)[None, :]
    at = n[:, None] * WEIGHT_GROUPS + g[None, :]
    scale = tl.load(scales_ptr + at, mask=g_inside, other=0.0).to(tl.float32)
    zero = load_zeros(zeros_ptr, at, g_inside, N * WEIGHT_GROUPS, BITS, WIDTH)
    weight = (codes - by_column(zero, BLOCK_G, BLOCK_N, BLOCK_K)) * by_column(scale, BLOCK_G, BLOCK_N, BLOCK_K)
    mask = inside[:, None] & (k < K)[None, :]
    tl.store(y_ptr + rows[:, None] * K + k[None, :], weight.to(y_ptr.dtype.element_ty), mask=mask)
