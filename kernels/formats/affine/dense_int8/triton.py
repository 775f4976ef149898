"""int8 gemm on tensor cores, both operands straight from memory, scaled once a group.

Unpacking codes takes longer than a tensor core multiplies them, and a packed gemm repeats it for each tile of tokens.
So for many tokens `dequantize_kernel` does it once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.tiles import add_branch, tile_of


@triton.jit
def dense_int8_kernel(
    x_ptr,  # (M, K) int8
    step_ptr,  # (ACT_GROUPS, M) fp32
    weight_ptr,  # (N, K) int8, twice the centred codes
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    bias_ptr,  # (N,)
    latent_ptr,  # (M, R)
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    y_ptr,  # (M, N)
    M,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PART_ROWS: tl.constexpr, GROUP: tl.constexpr,
    WEIGHT_GROUPS: tl.constexpr, ACT_GROUP: tl.constexpr, ACT_GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    HALVES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """One program: HALVES times BLOCK_M tokens by BLOCK_N output features; BLOCK_K columns share a scale and a step.

    With two halves, some warps scale the product of one while tensor cores compute the other.
    """
    first_m, first_n = tile_of(tl.program_id(0), M, N, HALVES * BLOCK_M, BLOCK_N, GROUP_M)
    # Tiles start at 64-bit addresses; inside a tile 32 bits are enough.
    x_ptr += first_m.to(tl.int64) * K
    weight_ptr += first_n.to(tl.int64) * K
    y_ptr += first_m.to(tl.int64) * N
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = first_m + rows, first_n + cols
    n_inside = n < N
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    more = acc
    for start in range(0, K, BLOCK_K):
        # Scales are in flight while tensor cores compute the products.
        scale = tl.load(scales_ptr + n * WEIGHT_GROUPS + start // GROUP, mask=n_inside, other=0.0).to(tl.float32)
        k = start + tl.arange(0, BLOCK_K)
        at = weight_ptr + cols[:, None] * K + k[None, :]
        weight = tl.load(at, mask=n_inside[:, None] & (k < K)[None, :], other=0)
        step_at = step_ptr + start // ACT_GROUP * M
        acc += _product(weight, x_ptr, step_at, rows, m, k, M, K, ACT_GROUPS) * scale[:, None]
        if HALVES == 2:
            more_at = x_ptr + BLOCK_M * K
            more += _product(weight, more_at, step_at, rows, m + BLOCK_M, k, M, K, ACT_GROUPS) * scale[:, None]
    for half in tl.static_range(HALVES):
        acc = more if half == 1 else acc
        m = first_m + half * BLOCK_M + rows
        # The weight is twice what it stands for.
        acc *= 0.5
        if ACT_GROUPS == 1:
            acc *= tl.load(step_ptr + m, mask=m < M, other=0.0)[None, :]
        acc = add_branch(
            acc, bias_ptr, latent_ptr, up_ptr, up_scale_ptr, m, n, M, N, R, 1, PART_ROWS, BLOCK_M, BLOCK_R,
            latent_ptr.dtype.element_ty, HAS_BIAS, HAS_SCALES, "ieee",
        )  # fmt: skip
        at = y_ptr + (half * BLOCK_M + rows)[None, :] * N + n[:, None]
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=n_inside[:, None] & (m < M)[None, :])


@triton.jit
def _product(
    weight,  # (BLOCK_N, BLOCK_K) int8
    x_ptr,  # (M, K) int8, at the first token
    step_ptr,  # (M,) fp32
    rows, m, k, M,
    K: tl.constexpr, ACT_GROUPS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, tokens) fp32, times the activation's steps if it has several groups."""
    inside = m < M
    x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
    product = tl.dot(weight, tl.trans(x)).to(tl.float32)
    if ACT_GROUPS > 1:
        product *= tl.load(step_ptr + m, mask=inside, other=0.0)[None, :]
    return product
