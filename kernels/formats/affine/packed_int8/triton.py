"""Integer activations on integer tensor cores: `tl.dot` of int8, scaled once a group."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.activation.triton import integers
from lopro_fx.kernels.fragments import code_bytes, load_words, reordered_bytes
from lopro_fx.kernels.tiles import add_branch, load_rotated, load_zeros, tile_of


@triton.jit
def round_kernel(
    x_ptr,  # (M, K)
    perm_ptr,  # (K,) int16 or int32
    signs_ptr,  # (ceil(K / 8),) uint8
    y_ptr,  # (M, K) int8
    step_ptr,  # (ACT_GROUPS, M) fp32
    sum_ptr,  # (SUM_GROUPS, M) fp32: sums of the integers of each SUM_SIZE columns, times the step if there are many
    M,
    K: tl.constexpr, TOP: tl.constexpr, CLIP: tl.constexpr, ACT_GROUP: tl.constexpr, ACT_GROUPS: tl.constexpr,
    SUM_SIZE: tl.constexpr, SUM_GROUPS: tl.constexpr, CHUNK: tl.constexpr, LOG_BLOCK: tl.constexpr,
    HAS_PERM: tl.constexpr, HAS_SIGNS: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK columns of one token, rotated and rounded."""
    # Neighbouring programs take one token, as in `rotate_kernel`.
    CHUNKS: tl.constexpr = (K + CHUNK - 1) // CHUNK
    m = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    start = chunk * CHUNK
    x = load_rotated(
        x_ptr + m * K, x_ptr, x_ptr, perm_ptr, signs_ptr, start, K, True,
        K, 0.0, CHUNK, LOG_BLOCK, "", False, HAS_PERM, HAS_SIGNS,
    )  # fmt: skip
    PARTS: tl.constexpr = CHUNK // ACT_GROUP
    parts = tl.reshape(x, (PARTS, ACT_GROUP))
    codes, step = integers(parts, TOP, CLIP)
    g = chunk * PARTS + tl.arange(0, PARTS)
    tl.store(step_ptr + g.to(tl.int64) * M + m, step, mask=g < ACT_GROUPS)
    k = start + tl.arange(0, CHUNK)
    tl.store(y_ptr + m * K + k, tl.reshape(codes, (CHUNK,)).to(tl.int8), mask=k < K)
    SUMS: tl.constexpr = CHUNK // SUM_SIZE
    sums = tl.sum(tl.reshape(codes, (PARTS, SUMS // PARTS, SUM_SIZE)), axis=2).to(tl.float32)
    if ACT_GROUPS > 1:
        sums *= step[:, None]
    s = chunk * SUMS + tl.arange(0, SUMS)
    tl.store(sum_ptr + s.to(tl.int64) * M + m, tl.reshape(sums, (SUMS,)), mask=s < SUM_GROUPS)


@triton.jit
def int8_matmul_kernel(
    x_ptr,  # (M, K) int8
    step_ptr,  # (ACT_GROUPS, M) fp32
    sum_ptr,  # (tiles of BLOCK_K, M) fp32, as `round_kernel` writes them
    codes_ptr,  # (N, ROW) int32
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # packed (N, WEIGHT_GROUPS)
    bias_ptr,  # (N,)
    latent_ptr,  # (M, R)
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    y_ptr,  # (M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PART_ROWS: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, WEIGHT_GROUPS: tl.constexpr,
    ACT_GROUP: tl.constexpr, ACT_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens by BLOCK_N output features; BLOCK_K columns share a scale and a step."""
    first_m, first_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # Tiles start at 64-bit addresses; inside a tile 32 bits are enough.
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    x_ptr += first_m.to(tl.int64) * K
    codes_ptr += first_n.to(tl.int64) * (WORDS * BITS // WIDTH)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = first_m + rows, first_n + cols
    m_inside, n_inside = m < M, n < N
    BLOCK_W: tl.constexpr = BLOCK_K * WIDTH // 32
    # 8-bit codes don't fit int8: half their range is subtracted, and added back with the zero point.
    CENTRE: tl.constexpr = 128 if BITS == 8 else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    step_ptr += m
    sum_ptr += m
    for tile in range(TILES):
        # Operands that scale the product are in flight while tensor cores compute it.
        at = n * WEIGHT_GROUPS + tile * BLOCK_K // GROUP
        scale = tl.load(scales_ptr + at, mask=n_inside, other=0.0).to(tl.float32)
        offset = CENTRE - load_zeros(zeros_ptr, at, n_inside, N * WEIGHT_GROUPS, BITS, WIDTH)
        total = tl.load(sum_ptr, mask=m_inside, other=0.0)
        sum_ptr += M
        if ACT_GROUPS > 1:
            step = tl.load(step_ptr + tile * BLOCK_K // ACT_GROUP * M, mask=m_inside, other=0.0)
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=m_inside[:, None] & (k < K)[None, :], other=0)
        x = tl.trans(reordered_bytes(x, WIDTH, BLOCK_M, BLOCK_W))
        main, high = load_words(codes_ptr, N - first_n, tile, WORDS, BITS, WIDTH, BLOCK_N, BLOCK_W, WARPS)
        codes = code_bytes(main, high, BITS, WIDTH, BLOCK_N, BLOCK_W)
        product = tl.dot(codes, x).to(tl.float32)
        if ACT_GROUPS > 1:
            product *= step[None, :]
        acc += (product + offset[:, None] * total[None, :]) * scale[:, None]
    if ACT_GROUPS == 1:
        acc *= tl.load(step_ptr, mask=m_inside, other=0.0)[None, :]
    acc = add_branch(
        acc, bias_ptr, latent_ptr, up_ptr, up_scale_ptr, m, n, M, N, R, 1, PART_ROWS, BLOCK_M, BLOCK_R,
        latent_ptr.dtype.element_ty, HAS_BIAS, HAS_SCALES, "ieee",
    )  # fmt: skip
    y_ptr += first_m.to(tl.int64) * N
    inside = n_inside[:, None] & m_inside[None, :]
    tl.store(y_ptr + rows[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=inside)
