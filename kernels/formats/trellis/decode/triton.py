"""Gemv of decoding: y = Q̂ x' + B (A x') + b for one token, bound by taking states out of their strings.

`decode_prepare` of the format "affine" writes x' as 16-bit fixed point, its high and low bytes four columns a word.
Spread over the bytes of a state's product, they make two byte dot products multiply one weight, or both of a pair:
integers of 16 bits times those bytes are exact, where fp32 would take two operations more for each weight.

A thread takes four rows, as in `packing/triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.formats.trellis.packing.triton import QUAD, UNIT, four, load_states, products, strings_of
from lopro_fx.kernels.tiles import dot4

# Rows of a program: one warp's.
BLOCK_N = 128
# Words of fixed point, of four columns each, in a group of one step.
_WORDS_IN_GROUP = tl.constexpr(32)


@triton.jit
def _spread(x, S: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    """Byte S of x four times, or of its pair S of bytes (u, v) the bytes u, v, v, u: as the product's bytes need it."""
    if NATIVE:
        ORDER: tl.constexpr = S * 0x1111 if COLUMNS == 1 else 0x0110 + S * 0x2222
        y = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $1, $2;", "=r,r,r", [x, tl.full(x.shape, ORDER, tl.int32)], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
    elif COLUMNS == 1:
        y = ((x >> (8 * S)) & 255) * 0x01010101
    else:
        y = ((x >> (16 * S)) & 255) * 0x01000001 + ((x >> (16 * S + 8)) & 255) * 0x00010100
    return y


@triton.jit
def product_kernel(
    words_ptr,  # (M, 2, 1, WORDS) int32: high bytes, low bytes
    steps_ptr,  # (M, 2, GROUPS) fp32, the first of each two
    latent_ptr,  # (CHUNKS, M, R) fp32
    scales_ptr,  # (N,) fp16 or fp32
    codes_ptr,  # int32
    bias_ptr,  # (N,)
    down_scale_ptr,  # (R,) fp16
    core_ptr,  # (R, R) fp16
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    residual_ptr,  # (M, N)
    y_ptr,  # (SPLITS, M, N)
    M,
    N: tl.constexpr, R: tl.constexpr, PART_ROWS: tl.constexpr, PAIRS: tl.constexpr, WORDS: tl.constexpr,
    GROUPS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, STRIP: tl.constexpr,
    STRIPS: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_G: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOWN_SCALE: tl.constexpr,
    HAS_CORE: tl.constexpr, HAS_UP_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: 128 output features of one token, over one of SPLITS parts of the groups; a warp takes a group."""
    LANES: tl.constexpr = 32
    IN_WORD: tl.constexpr = 4 // COLUMNS
    IN_GROUP: tl.constexpr = _WORDS_IN_GROUP * IN_WORD
    EVEN: tl.constexpr = WORDS == GROUPS * _WORDS_IN_GROUP and PAIRS == GROUPS * IN_GROUP and GROUPS % BLOCK_G == 0
    tl.static_assert(28 + 3 * STEP + WINDOW <= 64)
    first = tl.program_id(0) * (QUAD * LANES)
    split = tl.program_id(1)
    m = tl.program_id(2).to(tl.int64)
    n = first + tl.arange(0, QUAD * LANES)
    n_last = (n < N) & (split == 0)
    # Operands of the epilogue are prefetched, in flight while the loop runs; only the first part adds them.
    if R > 0:
        r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_CHUNKS)
        parts_inside = (c < CHUNKS)[:, None] & (r < R)[None, :]
        parts = tl.load(latent_ptr + (c[:, None] * M + m) * R + r[None, :], mask=parts_inside, other=0.0)
        if HAS_CORE:
            square = (r < R)[:, None] & (r < R)[None, :]
            core = tl.load(core_ptr + r[:, None] * R + r[None, :], mask=square, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m * N + n, mask=n_last, other=0.0)

    quad = first + QUAD * tl.arange(0, LANES)
    strip, length, bit = strings_of(quad, N, PAIRS, STEP, STRIP, STRIPS)
    word = bit // 32
    shift = (bit % 32).to(tl.int64)[None, :]
    inside = (quad < N)[None, :]
    follows = inside & (word + 1 < length)[None, :]
    strings = codes_ptr + (strip + word)[None, :]
    length = length[None, :]
    words_ptr += m * (2 * WORDS)
    steps_ptr += m * (2 * GROUPS)
    ones = tl.full((BLOCK_G, LANES), 0x01010101, tl.int32)
    nothing = tl.zeros((BLOCK_G, LANES), tl.int32)
    acc = tl.zeros((BLOCK_G, LANES, 2, 2), tl.float32)
    tiles = tl.cdiv(tl.cdiv(GROUPS, BLOCK_G), SPLITS)
    for tile in range(split * tiles, min((split + 1) * tiles, tl.cdiv(GROUPS, BLOCK_G))):
        # Every lane of a warp has the same group.
        g = tl.broadcast_to((tile * BLOCK_G + tl.arange(0, BLOCK_G))[:, None], (BLOCK_G, LANES))
        group = strings + (g * IN_GROUP).to(tl.int64) * length
        sum_high, sum_low = nothing, nothing
        upper = four(nothing, nothing, nothing, nothing)
        lower = upper
        for w in range(0, min(_WORDS_IN_GROUP, WORDS), UNROLL):
            for u in tl.static_range(UNROLL):
                at = g * _WORDS_IN_GROUP + w + u
                known = at < (1 << 30) if EVEN else at < WORDS
                x_high = tl.load(words_ptr + at, mask=known, other=0)
                x_low = tl.load(words_ptr + WORDS + at, mask=known, other=0)
                sum_high = dot4(ones, x_high, sum_high, True, NATIVE)
                sum_low = dot4(ones, x_low, sum_low, False, NATIVE)
                for s in tl.static_range(IN_WORD):
                    pair = (w + u) * IN_WORD + s
                    there = inside if EVEN else inside & (g * IN_GROUP + pair < PAIRS)
                    after = follows if EVEN else follows & there
                    product = products(load_states(group + pair * length, there, after, shift, STEP, WINDOW))
                    top, bottom = _spread(x_high, s, COLUMNS, NATIVE), _spread(x_low, s, COLUMNS, NATIVE)
                    upper = dot4(product, four(top, top, top, top), upper, True, NATIVE)
                    lower = dot4(product, four(bottom, bottom, bottom, bottom), lower, False, NATIVE)
        # Bytes are centred by the sum of the group's integers: within 31 bits, though terms on the way may wrap round.
        centre = (sum_high * 256 + sum_low) * (510 // COLUMNS)
        whole = upper * 256 + lower - four(centre, centre, centre, centre)
        step = tl.load(steps_ptr + g, mask=g < GROUPS, other=0.0)
        acc += whole.to(tl.float32) * four(step, step, step, step)
    y = tl.reshape(tl.sum(acc, axis=0), (QUAD * LANES,))
    y *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32) * UNIT
    if R > 0:
        latent = tl.sum(parts, axis=0)
        if HAS_DOWN_SCALE:
            latent *= tl.load(down_scale_ptr + r, mask=r < R, other=0.0).to(tl.float32)
        if HAS_CORE:
            latent = tl.sum(core.to(tl.float32) * latent[None, :], axis=1)
        up_inside = n_last[:, None] & (r < R)[None, :]
        up = tl.load(up_ptr + n[:, None] * R + r[None, :], mask=up_inside, other=0).to(tl.float32)
        if HAS_UP_SCALE:
            part = (n // PART_ROWS)[:, None]
            up *= tl.load(up_scale_ptr + part * R + r[None, :], mask=up_inside, other=0.0).to(tl.float32)
        y += tl.sum(up * latent[None, :], axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_last, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += residual.to(tl.float32)
    tl.store(y_ptr + (split * M + m) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
