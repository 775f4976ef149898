"""Packed gemm for several tokens: codes become an operand of `tl.dot` in registers.

Tiles are transposed, output features by tokens: a tensor core takes its first operand in larger pieces, which few
tokens would leave empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.fragments import centred_codes, in_order, load_words
from lopro_fx.kernels.tiles import add_branch, by_column, load_zeros, tile_of


@triton.jit
def matmul_kernel(
    x_ptr,  # (M, K), columns in the order of `fragments.py`, K filled up to whole steps
    codes_ptr,  # (N, ROW) int32
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # packed (N, WEIGHT_GROUPS)
    bias_ptr,  # (N,)
    latent_ptr,  # (PARTS, M, R)
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    residual_ptr,  # (M, N)
    y_ptr,  # (SPLITS, M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, PART_ROWS: tl.constexpr,
    WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, WEIGHT_GROUPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens by BLOCK_N output features, over one of SPLITS parts of the columns."""
    split = tl.program_id(1)
    first_m, first_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # Tiles start at 64-bit addresses; inside a tile 32 bits are enough.
    x_ptr += first_m.to(tl.int64) * K
    codes_ptr += first_n.to(tl.int64) * (WORDS * BITS // WIDTH)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = first_m + rows, first_n + cols
    m_inside, n_inside = m < M, n < N
    BLOCK_W: tl.constexpr = BLOCK_K * WIDTH // 32
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tiles = tl.cdiv(K // BLOCK_K, SPLITS)
    first, last = split * tiles, min((split + 1) * tiles, K // BLOCK_K)
    group = n * WEIGHT_GROUPS
    if GROUP >= BLOCK_K:
        scale = tl.load(scales_ptr + group + first * BLOCK_K // GROUP, mask=n_inside & (first < last), other=0.0)
    for tile in range(first, last):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=m_inside[:, None], other=0.0)
        x = tl.trans(x)
        main, high = load_words(codes_ptr, N - first_n, tile, WORDS, BITS, WIDTH, BLOCK_N, BLOCK_W, WARPS)
        if GROUP < BLOCK_K:
            g = tile * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
            inside = n_inside[:, None] & (g < WEIGHT_GROUPS)[None, :]
            at = group[:, None] + g[None, :]
            scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
            zero = load_zeros(zeros_ptr, at, inside, N * WEIGHT_GROUPS, BITS, WIDTH)
            scale = by_column(scale, BLOCK_K // GROUP, BLOCK_N, BLOCK_W)
            zero = by_column(zero, BLOCK_K // GROUP, BLOCK_N, BLOCK_W)
            codes = centred_codes(main, high, zero, dtype, BITS, WIDTH, BLOCK_N, BLOCK_W, NATIVE)
            weight = (codes.to(tl.float32) * scale[:, :, None, None]).to(dtype)
            acc = tl.dot(in_order(weight, WIDTH, BLOCK_N, BLOCK_W), x, acc, input_precision=PRECISION)
        else:
            # A step lies in one group: its scale multiplies the product, and codes of up to 4 bits are exact. The next
            # step's scale is on its way meanwhile.
            following = (tile + 1) * BLOCK_K // GROUP
            ahead = tl.load(scales_ptr + group + following, mask=n_inside & (following < WEIGHT_GROUPS), other=0.0)
            at = group + tile * BLOCK_K // GROUP
            zero = load_zeros(zeros_ptr, at, n_inside, N * WEIGHT_GROUPS, BITS, WIDTH)
            codes = centred_codes(main, high, zero[:, None], dtype, BITS, WIDTH, BLOCK_N, BLOCK_W, NATIVE)
            codes = in_order(codes, WIDTH, BLOCK_N, BLOCK_W)
            acc += tl.dot(codes, x, input_precision=PRECISION) * scale.to(tl.float32)[:, None]
            scale = ahead
    if split == 0:
        acc = add_branch(
            acc, bias_ptr, latent_ptr, up_ptr, up_scale_ptr, m, n, M, N, R, PARTS, PART_ROWS, BLOCK_M, BLOCK_R,
            dtype, HAS_BIAS, HAS_SCALES, PRECISION,
        )  # fmt: skip
        if HAS_RESIDUAL:
            at = residual_ptr + first_m.to(tl.int64) * N + rows[None, :] * N + n[:, None]
            acc += tl.load(at, mask=n_inside[:, None] & m_inside[None, :], other=0.0).to(tl.float32)
    y_ptr += (split.to(tl.int64) * M + first_m) * N
    inside = n_inside[:, None] & m_inside[None, :]
    tl.store(y_ptr + rows[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)
