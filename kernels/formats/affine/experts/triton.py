"""The kernels of one weight for many: a program puts their pointers where its expert's tensors begin."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.formats.affine.decode.triton import prepare_kernel, product_kernel
from lopro_fx.kernels.formats.affine.linear.triton import matmul_kernel
from lopro_fx.kernels.routed.triton import cell_of, expert_of, store_nan, tile_of_pairs


@triton.jit
def experts_prepare_kernel(
    x_ptr,  # (tokens, K), rows X_ROW apart
    gate_ptr,  # (tokens, K), rows GATE_ROW apart
    perm_ptr,  # (K,) int16 or int32
    signs_ptr,  # (ceil(K / 8),) uint8
    down_ptr,  # (rows * R, K) int8 or fp16
    ids_ptr,  # (pairs,)
    cells_ptr,  # (EXPERTS, 2) int32
    words_ptr,  # (tokens, 2, FIELDS, WORDS) int32
    steps_ptr,  # (tokens, 2, GROUPS) fp32
    latent_ptr,  # (CHUNKS, pairs, R) fp32
    pairs,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, WORDS: tl.constexpr,
    FIELDS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, LOG_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, X_ROW: tl.constexpr, GATE_ROW: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_CELLS: tl.constexpr, HAS_PERM: tl.constexpr, HAS_SIGNS: tl.constexpr,
):  # fmt: skip
    """A program of `prepare_kernel` for one pair, the first axis of the grid: a token's pairs all write its words."""
    pair = tl.program_id(0).to(tl.int64)
    expert, _ = expert_of(ids_ptr + pair, EXPERTS)
    row, _ = cell_of(cells_ptr, expert, HAS_CELLS)
    # It counts pairs where activations are a token's.
    back = pair // SLOTS - pair
    prepare_kernel(
        x_ptr + back * X_ROW, x_ptr, gate_ptr + back * GATE_ROW, perm_ptr, signs_ptr, down_ptr + row * (R * K),
        words_ptr + back * (2 * FIELDS * WORDS), steps_ptr + back * (2 * GROUPS), latent_ptr, pairs,
        K, R, WORDS, FIELDS, GROUP, GROUPS, CHUNK, LOG_BLOCK, BLOCK_R, X_ROW, GATE_ROW, 0.0, ACTIVATION, False,
        HAS_PERM, HAS_SIGNS,
    )  # fmt: skip


@triton.jit
def experts_product_kernel(
    words_ptr,  # (tokens, 2, FIELDS, WORDS) int32
    steps_ptr,  # (tokens, 2, GROUPS) fp32
    latent_ptr,  # (CHUNKS, pairs, R) fp32, or (tokens, LATENT) where that is not 0
    codes_ptr,  # (EXPERTS, N, WORDS * BITS / WIDTH) int32
    scales_ptr,  # (EXPERTS, N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # (EXPERTS, ZEROS), of each packed (N, WEIGHT_GROUPS)
    down_scale_ptr,  # (rows * R,) fp16
    core_ptr,  # (EXPERTS, R, R) fp16
    up_ptr,  # (columns, N, R) int8 or fp16
    up_scale_ptr,  # (columns, R) fp16
    ids_ptr,  # (pairs,)
    cells_ptr,  # (EXPERTS, 2) int32
    y_ptr,  # (SPLITS, pairs, N)
    pairs,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ZEROS: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    LATENT: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    WORDS_IN_GROUP: tl.constexpr, GROUPS: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, HAS_CELLS: tl.constexpr, HAS_DOWN_SCALE: tl.constexpr, HAS_CORE: tl.constexpr,
    HAS_UP_SCALE: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program of `product_kernel` for one pair, the third axis of the grid."""
    pair = tl.program_id(2).to(tl.int64)
    expert, known = expert_of(ids_ptr + pair, EXPERTS)
    row, column = cell_of(cells_ptr, expert, HAS_CELLS)
    token = pair // SLOTS
    # It counts pairs where activations are a token's.
    back = token - pair
    if LATENT > 0:
        latent_ptr += token * LATENT + (row - pair) * R
    product_kernel(
        words_ptr + back * (2 * FIELDS * WORDS), steps_ptr + back * (2 * GROUPS), latent_ptr,
        codes_ptr + expert * (N * (WORDS * BITS // WIDTH)), scales_ptr + expert * (N * WEIGHT_GROUPS),
        zeros_ptr + expert * ZEROS, words_ptr, down_scale_ptr + row * R, core_ptr + expert * (R * R),
        up_ptr + column * (N * R), up_scale_ptr + column * R, words_ptr, y_ptr, pairs,
        N, R, N, WORDS, FIELDS, BITS, WIDTH, WORDS_IN_GROUP, GROUPS, WEIGHT_GROUPS, CHUNKS, SPLITS, BLOCK_N, BLOCK_W,
        BLOCK_R, BLOCK_CHUNKS, False, HAS_DOWN_SCALE, HAS_CORE, HAS_UP_SCALE, False, STAGES, NATIVE,
    )  # fmt: skip
    # After the barrier, whichever thread stored what was there.
    tl.debug_barrier()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    store_nan(y_ptr + (tl.program_id(1) * pairs + pair) * N + n, (n < N) & ~known)


@triton.jit
def experts_matmul_kernel(
    x_ptr,  # (tokens, K) as `matmul_kernel` takes it
    own_ptr,  # (pairs, R) fp32
    codes_ptr,  # (EXPERTS, N, WORDS * BITS / WIDTH) int32
    scales_ptr,  # (EXPERTS, N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # (EXPERTS, ZEROS), of each packed (N, WEIGHT_GROUPS)
    up_ptr,  # (columns, N, R) int8 or fp16
    up_scale_ptr,  # (columns, R) fp16
    order_ptr,  # (pairs,) int64
    starts_ptr,  # (EXPERTS + 1,) int32
    cells_ptr,  # (EXPERTS, 2) int32
    y_ptr,  # (pairs, N)
    pairs,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ZEROS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    WEIGHT_GROUPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HAS_CELLS: tl.constexpr, HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """A program of `matmul_kernel` for a tile of pairs, the third axis of the grid; the first are output features."""
    expert, place, left = tile_of_pairs(starts_ptr, tl.program_id(2), pairs, EXPERTS, BLOCK_E, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    pair = tl.load(order_ptr + place + rows, mask=rows < left, other=0)
    if expert < EXPERTS:
        e = expert.to(tl.int64)
        column = e
        if HAS_CELLS:
            column = tl.load(cells_ptr + 2 * e + 1).to(tl.int64)
        # It counts rows from 0, and adds as many strides to each pointer.
        token, row = (pair // SLOTS - rows) * K, pair - rows
        matmul_kernel(
            x_ptr + token[:, None], codes_ptr + e * (N * (WORDS * BITS // WIDTH)), scales_ptr + e * (N * WEIGHT_GROUPS),
            zeros_ptr + e * ZEROS, codes_ptr, own_ptr + (row * R)[:, None], up_ptr + column * (N * R),
            up_scale_ptr + column * R, codes_ptr, y_ptr + (row * N)[None, :], left,
            N, K, R, PARTS, N, WORDS, BITS, WIDTH, GROUP, WEIGHT_GROUPS, 1, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, 1,
            False, HAS_SCALES, False, PRECISION, NATIVE, WARPS,
        )  # fmt: skip
    else:
        n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        store_nan(y_ptr + (pair * N)[:, None] + n, (rows < left)[:, None] & (n < N))
