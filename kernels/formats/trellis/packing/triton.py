"""Dequantise in one pass: read the bit strings with rows in lanes, write (N, K), and add the low-rank branch.

Four rows of a string begin within 28 bits of a word and need at most 59 bits, so two words serve a thread's four rows.

Names: STEP new bits of a step, COLUMNS of a state, PAIRS = ceil(K / COLUMNS) strings of a strip, WINDOW bits of a
state, STRIP rows of each strip but the last of STRIPS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.formats.trellis.code import MULTIPLIER as _MULTIPLIER
from lopro_fx.kernels.formats.trellis.code import UNIT as _UNIT
from lopro_fx.kernels.tiles import dot4

# Rows of a thread.
QUAD = tl.constexpr(4)
MULTIPLIER = tl.constexpr(_MULTIPLIER)
UNIT = tl.constexpr(_UNIT)


@triton.jit
def strings_of(
    n, N: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr
):  # fmt: skip
    """Of rows n (int32): first word of their strip (int64), words of each of its strings, and their bit in a string."""
    strip = tl.minimum(n // STRIP, STRIPS - 1)
    WHOLE: tl.constexpr = STRIP // 32 * STEP
    LAST: tl.constexpr = (N - (STRIPS - 1) * STRIP + 31) // 32 * STEP
    length = tl.where(strip == STRIPS - 1, LAST, WHOLE)
    return strip.to(tl.int64) * (WHOLE * PAIRS), length, (n - strip * STRIP) * STEP


@triton.jit
def four(a, b, c, d):
    """(…, 2, 2) whose entries in order are a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def load_states(at, there, after, shift, STEP: tl.constexpr, WINDOW: tl.constexpr):
    """States of four rows from the words at `at` and, where `after`, behind them: (…, 2, 2), rows in order.

    `shift` is the first row's bit in its word, int64; `there` masks the words.
    """
    low = tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    # Zeros follow the end of a string.
    both = low | (tl.load(at + 1, mask=after, other=0).to(tl.int64) << 32)
    states = four(
        (both >> shift).to(tl.int32), (both >> (shift + STEP)).to(tl.int32),
        (both >> (shift + 2 * STEP)).to(tl.int32), (both >> (shift + 3 * STEP)).to(tl.int32),
    )  # fmt: skip
    return states & ((1 << WINDOW) - 1)


@triton.jit
def products(states):
    """The product of each state, int32 of any shape, as four bytes in an int32."""
    return (states.to(tl.uint32, bitcast=True) * MULTIPLIER).to(tl.int32, bitcast=True)


@triton.jit
def _value(product, WEIGHTS: tl.constexpr, CENTRE: tl.constexpr, NATIVE: tl.constexpr):
    """Sum of the bytes that WEIGHTS has a 1 for, less CENTRE, in units of the row's scale, fp32."""
    ones, base = tl.full(product.shape, WEIGHTS, tl.int32), tl.full(product.shape, 0x4B000000, tl.int32)
    # Summed up in the mantissa of 2^23: no conversion of an integer.
    return (dot4(product, ones, base, False, NATIVE).to(tl.float32, bitcast=True) - (8388608.0 + CENTRE)) * UNIT


@triton.jit
def dequantize_kernel(
    scales_ptr,  # (N,) fp16 or fp32
    codes_ptr,  # (words,) int32
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    down_ptr,  # (R, K) int8 or fp16
    down_scale_ptr,  # (R,) fp16
    y_ptr,  # (N, K)
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PART_ROWS: tl.constexpr, PAIRS: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HAS_UP_SCALE: tl.constexpr,
    HAS_DOWN_SCALE: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows by BLOCK_K columns; neighbouring programs write neighbouring columns."""
    tl.static_assert(28 + 3 * STEP + WINDOW <= 64)
    first, start = tl.program_id(1) * BLOCK_N, tl.program_id(0) * BLOCK_K
    BLOCK_P: tl.constexpr = BLOCK_K // COLUMNS
    rows = tl.arange(0, BLOCK_N)
    n, k = first + rows, start + tl.arange(0, BLOCK_K)
    inside = n < N
    quad = first + QUAD * tl.arange(0, BLOCK_N // QUAD)
    strip, length, bit = strings_of(quad, N, PAIRS, STEP, STRIP, STRIPS)
    # A tile starts at 64-bit addresses; inside it 32 bits are enough. Rows are the last dimension: neighbouring lanes.
    p = tl.arange(0, BLOCK_P)[:, None]
    word = bit // 32
    at = codes_ptr + (strip + (start // COLUMNS).to(tl.int64) * length + word)[None, :] + p * length[None, :]
    there = (quad < N)[None, :] & (start // COLUMNS + p < PAIRS)
    after, shift = there & (word + 1 < length)[None, :], (bit % 32).to(tl.int64)[None, :]
    product = products(tl.reshape(load_states(at, there, after, shift, STEP, WINDOW), (BLOCK_P, BLOCK_N)))
    if COLUMNS == 1:
        weight = tl.trans(_value(product, 0x01010101, 510.0, NATIVE))
    else:
        pair = tl.join(_value(product, 0x01000001, 255.0, NATIVE), _value(product, 0x00010100, 255.0, NATIVE))
        weight = tl.reshape(tl.permute(pair, (1, 0, 2)), (BLOCK_N, BLOCK_K))
    weight *= tl.load(scales_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
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
    y_ptr += first.to(tl.int64) * K
    mask = inside[:, None] & (k < K)[None, :]
    tl.store(y_ptr + rows[:, None] * K + k[None, :], weight.to(y_ptr.dtype.element_ty), mask=mask)
