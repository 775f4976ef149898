"""Dequantise in one pass: read 2 to 8 bits a weight, write 8 to 32, and add the low-rank branch."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.tiles import by_column, load_codes, load_zeros


@triton.jit
def dequantize_kernel(
    codes_ptr,  # (N, ROW) int32
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # packed (N, WEIGHT_GROUPS)
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    down_ptr,  # (R, K) int8 or fp16
    down_scale_ptr,  # (R,) fp16
    y_ptr,  # (N, K)
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PART_ROWS: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HAS_UP_SCALE: tl.constexpr, HAS_DOWN_SCALE: tl.constexpr,
    DOUBLED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows by BLOCK_K columns; DOUBLED writes twice the centred codes, without scale.

    Neighbouring programs write neighbouring columns.
    """
    first, start = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_K
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
    weight = codes - by_column(zero, BLOCK_G, BLOCK_N, BLOCK_K)
    if DOUBLED:
        weight *= 2.0
    else:
        weight *= by_column(scale, BLOCK_G, BLOCK_N, BLOCK_K)
    mask = inside[:, None] & (k < K)[None, :]
    if R > 0:
        dtype = y_ptr.dtype.element_ty
        r = tl.arange(0, BLOCK_R)
        up_inside = inside[:, None] & (r < R)[None, :]
        up = tl.load(up_ptr + n[:, None] * R + r[None, :], mask=up_inside, other=0).to(tl.float32)
        if HAS_UP_SCALE:
            part = (n // PART_ROWS)[:, None]
            up *= tl.load(up_scale_ptr + part * R + r[None, :], mask=up_inside, other=0.0).to(tl.float32)
        if HAS_DOWN_SCALE:
            up *= tl.load(down_scale_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
        down_inside = (r < R)[:, None] & (k < K)[None, :]
        down = tl.load(down_ptr + r[:, None] * K + k[None, :], mask=down_inside, other=0)
        weight = tl.dot(up.to(dtype), down.to(dtype), weight, input_precision=PRECISION)
    tl.store(y_ptr + rows[:, None] * K + k[None, :], weight.to(y_ptr.dtype.element_ty), mask=mask)
