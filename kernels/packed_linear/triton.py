"""Packed product for many tokens: weights are dequantised in registers on their way into `tl.dot`."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.tiles import by_column, load_codes, load_zeros


@triton.jit
def matmul_kernel(
    x_ptr,  # (M, K)
    codes_ptr,  # (N, ROW) int32
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # packed (N, WEIGHT_GROUPS)
    bias_ptr,  # (N,)
    latent_ptr,  # (PARTS, M, R)
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    y_ptr,  # (SPLITS, M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, PART_ROWS: tl.constexpr,
    WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, WEIGHT_GROUPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens by BLOCK_N output features, over one of SPLITS parts of the columns."""
    # Neighbouring programs share weights: GROUP_M tiles of tokens for each tile of features, so that L2 serves them.
    program, split = tl.program_id(0), tl.program_id(1)
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = program // (GROUP_M * n_tiles) * GROUP_M
    height = min(m_tiles - first_m, GROUP_M)
    inner = program % (GROUP_M * n_tiles)
    # Tiles start at 64-bit addresses; inside a tile 32 bits are enough.
    first_m, first_n = (first_m + inner % height) * BLOCK_M, inner // height * BLOCK_N
    x_ptr += first_m.to(tl.int64) * K
    codes_ptr += first_n.to(tl.int64) * (WORDS * BITS // WIDTH)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = first_m + rows, first_n + cols
    m_inside, n_inside = m < M, n < N
    BLOCK_G: tl.constexpr = BLOCK_K // GROUP if GROUP < BLOCK_K else 1
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tiles = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    for tile in range(split * tiles, min((split + 1) * tiles, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=m_inside[:, None] & (k < K)[None, :], other=0.0)
        codes = load_codes(codes_ptr, cols, tile * BLOCK_K, n_inside, WORDS, BITS, WIDTH, BLOCK_N, BLOCK_K)
        g = tile * BLOCK_K // GROUP + tl.arange(0, BLOCK_G)
        inside = n_inside[:, None] & (g < WEIGHT_GROUPS)[None, :]
        at = n[:, None] * WEIGHT_GROUPS + g[None, :]
        scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
        shift = -scale * load_zeros(zeros_ptr, at, inside, N * WEIGHT_GROUPS, BITS, WIDTH)
        weight = codes * by_column(scale, BLOCK_G, BLOCK_N, BLOCK_K) + by_column(shift, BLOCK_G, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, tl.trans(weight.to(dtype)), acc, input_precision=PRECISION)
    if split == 0:
        if R > 0:
            r = tl.arange(0, BLOCK_R)
            inside = m_inside[:, None] & (r < R)[None, :]
            latent = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for part in tl.static_range(PARTS):
                at = latent_ptr + (part * M + m[:, None]) * R + r[None, :]
                latent += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            up_inside = n_inside[:, None] & (r < R)[None, :]
            up = tl.load(up_ptr + n[:, None] * R + r[None, :], mask=up_inside, other=0).to(tl.float32)
            if HAS_SCALES:
                part = (n // PART_ROWS)[:, None]
                up *= tl.load(up_scale_ptr + part * R + r[None, :], mask=up_inside, other=0.0).to(tl.float32)
            acc = tl.dot(latent.to(dtype), tl.trans(up.to(dtype)), acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    y_ptr += (split.to(tl.int64) * M + first_m) * N
    tl.store(
        y_ptr + rows[:, None] * N + n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=m_inside[:, None] & n_inside[None, :],
    )
