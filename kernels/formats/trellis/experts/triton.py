"""Experts of trellis weights: the gemv of one weight for many, and a gemm that decodes its operand.

A dense copy of every expert would take as much memory as the unquantised layer, however few rows each has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.formats.trellis.decode.triton import product_kernel
from lopro_fx.kernels.formats.trellis.packing.triton import QUAD, UNIT, load_states, products, strings_of
from lopro_fx.kernels.routed.triton import cell_of, expert_of, store_nan, tile_of_pairs
from lopro_fx.kernels.tiles import add_branch, dot4


@triton.jit
def experts_product_kernel(
    words_ptr,  # (tokens, 2, 1, WORDS) int32
    steps_ptr,  # (tokens, 2, GROUPS) fp32
    latent_ptr,  # (CHUNKS, pairs, R) fp32, or (tokens, LATENT) where that is not 0
    scales_ptr,  # (EXPERTS, N) fp16 or fp32
    codes_ptr,  # (EXPERTS, CODES) int32
    down_scale_ptr,  # (rows * R,) fp16
    core_ptr,  # (EXPERTS, R, R) fp16
    up_ptr,  # (columns, N, R) int8 or fp16
    up_scale_ptr,  # (columns, R) fp16
    ids_ptr,  # (pairs,)
    cells_ptr,  # (EXPERTS, 2) int32
    y_ptr,  # (SPLITS, pairs, N)
    pairs,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CODES: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    LATENT: tl.constexpr, PAIRS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr,
    COLUMNS: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, UNROLL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, HAS_CELLS: tl.constexpr, HAS_DOWN_SCALE: tl.constexpr, HAS_CORE: tl.constexpr,
    HAS_UP_SCALE: tl.constexpr, NATIVE: tl.constexpr,
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
        words_ptr + back * (2 * WORDS), steps_ptr + back * (2 * GROUPS), latent_ptr, scales_ptr + expert * N,
        codes_ptr + expert * CODES, words_ptr, down_scale_ptr + row * R, core_ptr + expert * (R * R),
        up_ptr + column * (N * R), up_scale_ptr + column * R, words_ptr, y_ptr, pairs,
        N, R, N, PAIRS, WORDS, GROUPS, STEP, COLUMNS, WINDOW, STRIP, STRIPS, CHUNKS, SPLITS, BLOCK_G, UNROLL, BLOCK_R,
        BLOCK_CHUNKS, False, HAS_DOWN_SCALE, HAS_CORE, HAS_UP_SCALE, False, NATIVE,
    )  # fmt: skip
    # After the barrier, whichever thread stored what was there.
    tl.debug_barrier()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    store_nan(y_ptr + (tl.program_id(1) * pairs + pair) * N + n, (n < N) & ~known)


@triton.jit
def _sum_of_bytes(product, WEIGHTS: tl.constexpr, CENTRE: tl.constexpr, NATIVE: tl.constexpr):
    """Sum of the bytes that WEIGHTS has a 1 for, less CENTRE, fp32: a whole number of at most 10 bits."""
    ones, base = tl.full(product.shape, WEIGHTS, tl.int32), tl.full(product.shape, 0x4B000000, tl.int32)
    # Summed up in the mantissa of 2^23: no conversion of an integer.
    return dot4(product, ones, base, False, NATIVE).to(tl.float32, bitcast=True) - (8388608.0 + CENTRE)


@triton.jit
def _weights(
    strings,  # (1, BLOCK_N / QUAD) pointers to the first words of four rows, at column 0
    start, length, follows, inside, shift,  # (1, BLOCK_N / QUAD)
    K: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Weights of columns [start, start + BLOCK_K) without scale and UNIT, fp32 (BLOCK_K, BLOCK_N)."""
    BLOCK_P: tl.constexpr = BLOCK_K // COLUMNS
    p = tl.arange(0, BLOCK_P)[:, None]
    there = inside if K % BLOCK_K == 0 else inside & (start // COLUMNS + p < (K + COLUMNS - 1) // COLUMNS)
    # A step starts at 64-bit addresses; inside it 32 bits are enough.
    at = strings + length.to(tl.int64) * (start // COLUMNS) + p * length
    states = load_states(at, there, there & follows, shift, STEP, WINDOW)
    product = products(tl.reshape(states, (BLOCK_P, BLOCK_N)))
    if COLUMNS == 1:
        weight = _sum_of_bytes(product, 0x01010101, 510.0, NATIVE)
    else:
        first = _sum_of_bytes(product, 0x01000001, 255.0, NATIVE)
        pair = tl.join(first, _sum_of_bytes(product, 0x00010100, 255.0, NATIVE))
        weight = tl.reshape(tl.permute(pair, (0, 2, 1)), (BLOCK_K, BLOCK_N))
    return weight


@triton.jit
def experts_matmul_kernel(
    x_ptr,  # (tokens, K)
    own_ptr,  # (pairs, R) fp32
    scales_ptr,  # (EXPERTS, N) fp16 or fp32
    codes_ptr,  # (EXPERTS, CODES) int32
    up_ptr,  # (columns, N, R) int8 or fp16
    up_scale_ptr,  # (columns, R) fp16
    order_ptr,  # (pairs,) int64
    starts_ptr,  # (EXPERTS + 1,) int32
    cells_ptr,  # (EXPERTS, 2) int32
    y_ptr,  # (pairs, N)
    pairs,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CODES: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    STRIPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, HAS_CELLS: tl.constexpr, HAS_SCALES: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of a tile of pairs of one expert, the third axis of the grid.

    The product is of whole numbers that every dtype of an activation but bf16 holds; scales multiply its sum.
    """
    tl.static_assert(28 + 3 * STEP + WINDOW <= 64)
    expert, place, left = tile_of_pairs(starts_ptr, tl.program_id(2), pairs, EXPERTS, BLOCK_E, BLOCK_M)
    first = tl.program_id(0) * BLOCK_N
    rows, n = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
    n_inside, m_inside = n < N, rows < left
    pair = tl.load(order_ptr + place + rows, mask=m_inside, other=0)
    if expert < EXPERTS:
        e = expert.to(tl.int64)
        column = e
        if HAS_CELLS:
            column = tl.load(cells_ptr + 2 * e + 1).to(tl.int64)
        quad = first + QUAD * tl.arange(0, BLOCK_N // QUAD)
        strip, length, bit = strings_of(quad, N, (K + COLUMNS - 1) // COLUMNS, STEP, STRIP, STRIPS)
        strings = codes_ptr + (e * CODES + strip + bit // 32)[None, :]
        inside, follows = (quad < N)[None, :], (bit // 32 + 1 < length)[None, :]
        shift = (bit % 32).to(tl.int64)[None, :]
        dtype = x_ptr.dtype.element_ty
        tokens = x_ptr + (pair // SLOTS * K)[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            known = m_inside[:, None] if K % BLOCK_K == 0 else m_inside[:, None] & (k < K)[None, :]
            x = tl.load(tokens + k[None, :], mask=known, other=0.0)
            weight = _weights(
                strings, start, length[None, :], follows, inside, shift,
                K, STEP, COLUMNS, WINDOW, BLOCK_N, BLOCK_K, NATIVE,
            )  # fmt: skip
            acc = tl.dot(tl.trans(weight.to(dtype)), tl.trans(x), acc, input_precision=PRECISION)
        acc *= (tl.load(scales_ptr + e * N + n, mask=n_inside, other=0.0).to(tl.float32) * UNIT)[:, None]
        # It counts rows from 0, and adds as many strides to each pointer.
        own = own_ptr + ((pair - rows) * R)[:, None]
        acc = add_branch(
            acc, own_ptr, own, up_ptr + column * (N * R), up_scale_ptr + column * R, rows, n, left, N, R, PARTS, N,
            BLOCK_M, BLOCK_R, dtype, False, HAS_SCALES, PRECISION,
        )  # fmt: skip
        at = y_ptr + (pair * N)[None, :] + n[:, None]
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=n_inside[:, None] & m_inside[None, :])
    else:
        store_nan(y_ptr + (pair * N)[:, None] + n[None, :], m_inside[:, None] & n_inside[None, :])
