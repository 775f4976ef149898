"""Packed codes as an operand of `tl.dot`, unpacked by each thread from whole words.

Of 16 columns, a tensor core takes the pairs (2t, 2t + 1) and (2t + 8, 2t + 9) from thread t of four. A dot product may
take columns in any order that both operands share. Here each of the four threads reads a run of a row's words, a fourth
of a step's: pair p of its word v, the codes p and p + PAIRS, goes to columns 8 (v PAIRS + p) + 2t. `in_order` reorders
a weight; an activation comes in that order from the launch before (`reordered`, `ordered`), and goes from memory to the
tensor cores as it is.
Codes p and p + PAIRS lie 16 bits apart, so one shift and one mask unpack both, as mantissa bits of floating-point
numbers with a fixed exponent. Names are those of `tiles.py`; PAIRS is 16 / WIDTH; BLOCK_W is the words of a step, at
least four.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def ordered_columns(columns: int, step: int) -> int:
    """Columns of an activation in the order of `in_order`: filled up to whole steps."""
    return triton.cdiv(columns, step) * step


def ordered(x: Tensor, width: int, step: int) -> Tensor:
    """x (M, K) in the order of `in_order` for steps of `step` columns, with zeros after column K, contiguous."""
    x = torch.nn.functional.pad(x, (0, ordered_columns(x.shape[1], step) - x.shape[1]))
    words = step * width // 128
    return x.view(x.shape[0], -1, 4, words, 2, 16 // width).permute(0, 1, 3, 5, 2, 4).reshape(x.shape)


@triton.jit
def reordered(x, WIDTH: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr):
    """`ordered` of whole steps x (SIZE,)."""
    x = tl.reshape(x, (SIZE // STEP, 4, STEP * WIDTH // 128, 2, 16 // WIDTH))
    return tl.reshape(tl.permute(x, (0, 2, 4, 1, 3)), (SIZE,))


@triton.jit
def load_words(
    tile_ptr,  # (BLOCK_N, ROW) int32, the first row of a tile
    left, tile,
    WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Load words [tile * BLOCK_W, + BLOCK_W) of the main plane (BLOCK_N, BLOCK_W), and for 3 bits the high plane's.

    A word of the high plane serves two of the main plane, shifted so that both find their bits in the same place. Rows
    from `left` on are zero.

    Each thread loads what it multiplies. Triton gives a warp 8 rows; of 16 rows of its fragment, a thread multiplies
    two that lie 8 apart, so rows are loaded in another order and put back.
    """
    V: tl.constexpr = max(BLOCK_W // 4, 1)
    W: tl.constexpr = min(WARPS, BLOCK_N // 16)
    i = tl.arange(0, BLOCK_N)
    row = i // (16 * W) * (16 * W) + i // 8 % W * 16 + i // (8 * W) % 2 * 8 + i % 8
    inside = row < left
    row_ptr = tile_ptr + row * (WORDS * BITS // WIDTH)
    main = _load_runs(row_ptr, inside, tile * BLOCK_W + tl.arange(0, BLOCK_W), WORDS, V)
    high = main
    if BITS == 3 and V > 1:
        p = tile * (BLOCK_W // 2) + tl.arange(0, BLOCK_W // 2)
        high = _load_runs(row_ptr + WORDS, inside, p, WORDS // 2, V // 2)
        high = tl.interleave(high, high >> 4)
    elif BITS == 3:
        # A thread has half a word: both threads load it.
        w = tile * BLOCK_W + tl.arange(0, BLOCK_W)
        high = _load_runs(row_ptr + WORDS, inside, w >> 1, WORDS // 2, 1) >> (4 * (w & 1))[None, :]
    return _by_row(main, W, BLOCK_N, BLOCK_W), _by_row(high, W, BLOCK_N, BLOCK_W)


@triton.jit
def _load_runs(row_ptr, inside, w, WORDS: tl.constexpr, RUN: tl.constexpr):
    """Load words `w` (BLOCK_W,) of rows (BLOCK_N,), as (BLOCK_N, BLOCK_W) of which a thread has RUN neighbours.

    Triton deals a tile's words out along the dimension in which addresses are contiguous, to each thread as many as are
    aligned together; hints limit either. It makes layouts of one shape alike: a third dimension tells this one apart.
    """
    at = (row_ptr[:, None] + w[None, :])[:, :, None]
    at = tl.max_contiguous(at, [1, max(RUN, 2), 1])
    if RUN == 1:
        at = tl.multiple_of(at, [4, 4, 4])
    there = inside[:, None] & (w < WORDS)[None, :]
    return tl.reshape(tl.load(at, mask=there[:, :, None], other=0), there.shape)


@triton.jit
def _by_row(words, W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Words (BLOCK_N, BLOCK_W) of `load_words`, rows in its order, with rows in theirs."""
    words = tl.permute(tl.reshape(words, (BLOCK_N // (16 * W), 2, W, 8, BLOCK_W)), (0, 2, 1, 3, 4))
    return tl.reshape(words, (BLOCK_N, BLOCK_W))


@triton.jit
def _moved(word, DOWN: tl.constexpr):
    """`word` shifted to the right by DOWN bits, to the left where that is negative."""
    return word >> DOWN if DOWN >= 0 else word << (-DOWN)


@triton.jit
def _pair(main, high, P: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, LIFT: tl.constexpr, BASE: tl.constexpr):
    """Pair P of every word: two 16-bit numbers BASE with the codes in the bits from LIFT on."""
    pair = (_moved(main, WIDTH * P - LIFT) & ((((1 << WIDTH) - 1) << LIFT) * 0x10001)) | (BASE * 0x10001)
    if BITS == 3:
        pair |= _moved(high, 8 * (P >> 2) + (P & 3) - LIFT - 2) & ((4 << LIFT) * 0x10001)
    return pair


@triton.jit
def _four(
    main, high, P: tl.constexpr, STEP: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, LIFT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Pairs P, P + STEP, P + 2 STEP, P + 3 STEP of every word, as (…, 2, 2)."""
    a = _pair(main, high, P, BITS, WIDTH, LIFT, BASE)
    b = _pair(main, high, P + STEP, BITS, WIDTH, LIFT, BASE)
    c = _pair(main, high, P + 2 * STEP, BITS, WIDTH, LIFT, BASE)
    d = _pair(main, high, P + 3 * STEP, BITS, WIDTH, LIFT, BASE)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def centred_codes(
    main, high,  # (BLOCK_N, BLOCK_W) int32
    zero,  # (BLOCK_N, 1 or BLOCK_W) fp32, code + 1/2
    dtype: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Code minus zero point, (BLOCK_N, BLOCK_W, PAIRS, 2) of `dtype`; exact, but 8 bits in bf16 are rounded once."""
    PAIRS: tl.constexpr = 16 // WIDTH
    BF16: tl.constexpr = dtype == tl.bfloat16 and BITS < 8
    half: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    # 64 + code, with a bit to spare for the half of a zero point; 8-bit codes only fit 1024 + code.
    LIFT: tl.constexpr = 1 if BF16 else 4 if BITS < 8 else 0
    BASE: tl.constexpr = 0x4280 if BF16 else 0x5400 if BITS < 8 else 0x6400
    if PAIRS == 2:
        first = _pair(main, high, 0, BITS, WIDTH, LIFT, BASE)
        pairs = tl.join(first, _pair(main, high, 1, BITS, WIDTH, LIFT, BASE))
    elif PAIRS == 4:
        pairs = tl.reshape(_four(main, high, 0, 1, BITS, WIDTH, LIFT, BASE), (BLOCK_N, BLOCK_W, PAIRS))
    else:
        even = _four(main, high, 0, 2, BITS, WIDTH, LIFT, BASE)
        odd = _four(main, high, 1, 2, BITS, WIDTH, LIFT, BASE)
        pairs = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_W, PAIRS))
    if NATIVE and BITS < 8:
        # One instruction for both numbers of a register: Triton's own arithmetic would take two.
        base = (-64.0 - zero).to(half).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        base = tl.broadcast_to((base | (base << 16))[:, :, None], pairs.shape)
        if BF16:
            low, high_ = tl.inline_asm_elementwise(
                "{.reg .b32 t; fma.rn.bf16x2 t, $2, $3, $4; mov.b32 {$0, $1}, t;}", "=h,=h,r,r,r",
                [pairs, tl.full(pairs.shape, 0x3F803F80, tl.int32), base],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            low, high_ = tl.inline_asm_elementwise(
                "{.reg .b32 t; add.rn.f16x2 t, $2, $3; mov.b32 {$0, $1}, t;}", "=h,=h,r,r",
                [pairs, base], dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
            )  # fmt: skip
        codes = tl.join(low, high_)
    else:
        low = (pairs & 0xFFFF).to(tl.int16).to(half, bitcast=True)
        codes = tl.join(low, (pairs >> 16).to(tl.int16).to(half, bitcast=True))
        if BITS < 8:
            codes = codes - (64.0 + zero).to(half)[:, :, None, None]
        else:
            codes = codes.to(tl.float32) - (1024.0 + zero)[:, :, None, None]
    return codes.to(dtype)


@triton.jit
def in_order(weight, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Reorder a weight (BLOCK_N, BLOCK_W, PAIRS, 2) into an operand (BLOCK_N, columns)."""
    PAIRS: tl.constexpr = 16 // WIDTH
    weight = tl.permute(tl.reshape(weight, (BLOCK_N, 4, BLOCK_W // 4, PAIRS, 2)), (0, 2, 3, 1, 4))
    return tl.reshape(weight, (BLOCK_N, BLOCK_W * 2 * PAIRS))


@triton.jit
def _field(main, high, FIELD: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Field FIELD of every word as four int8 (BLOCK_N, BLOCK_W, 2, 2); codes of 8 bits less 128."""
    # 8 bits have one field, and a mask of all bits doesn't fit a signed constant.
    four = main ^ -0x7F7F7F80 if BITS == 8 else (main >> (WIDTH * FIELD)) & (((1 << WIDTH) - 1) * 0x01010101)
    if BITS == 3:
        four |= ((high >> FIELD) & 0x01010101) << 2
    even = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
    return tl.join(even, tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8)))


@triton.jit
def code_bytes(main, high, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Codes as int8 (BLOCK_N, columns), less 128 where they have 8 bits, in the order of `reordered_bytes`."""
    FIELDS: tl.constexpr = 8 // WIDTH
    T: tl.constexpr = min(BLOCK_W, 4)
    codes = _field(main, high, 0, BITS, WIDTH)
    if FIELDS == 2:
        codes = tl.join(codes, _field(main, high, 1, BITS, WIDTH))
    elif FIELDS == 4:
        even = tl.join(codes, _field(main, high, 2, BITS, WIDTH))
        odd = tl.join(_field(main, high, 1, BITS, WIDTH), _field(main, high, 3, BITS, WIDTH))
        codes = tl.join(even, odd)
    codes = tl.permute(tl.reshape(codes, (BLOCK_N, T, BLOCK_W // T, 4, FIELDS)), (0, 2, 4, 1, 3))
    return tl.reshape(codes, (BLOCK_N, BLOCK_W * 4 * FIELDS))


@triton.jit
def reordered_bytes(x, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Reorder (BLOCK_M, columns) int8: byte j of field i of thread t's word v to column 16 (v FIELDS + i) + 4 t + j."""
    FIELDS: tl.constexpr = 8 // WIDTH
    T: tl.constexpr = min(BLOCK_W, 4)
    x = tl.permute(tl.reshape(x, (BLOCK_M, T, BLOCK_W // T, 4, FIELDS)), (0, 2, 4, 1, 3))
    return tl.reshape(x, (BLOCK_M, BLOCK_W * 4 * FIELDS))
