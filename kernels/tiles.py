"""Shared by the Triton kernels: butterflies, fields of packed words, and four-way dot products of bytes.

Names: `M` tokens, `N` output features, `K` input features; a *word* holds `32 / WIDTH` codes of the main plane, whose
`WIDTH` is 2 for 2 and 3 bits, 4 and 8 for the others (see `kernels/formats/affine/packing/format.py`).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from lopro_fx.kernels.prologue.triton import activated, inverse_rms

# Inline assembly needs an NVIDIA device; elsewhere Triton's own arithmetic computes the same.
NATIVE = os.environ.get("TRITON_INTERPRET", "0") != "1" and torch.version.hip is None
# A group size larger than any row, so that every column lies in group 0.
WHOLE_ROW = 1 << 30


def main_width(bits: int) -> int:
    """Bits of a code in the main plane."""
    return 2 if bits == 3 else bits


def stand_in(*tensors: Tensor | None) -> Tensor:
    """First given tensor, for an argument that a kernel doesn't read; activations come last.

    Inductor would write an activation once more for each further argument that it is passed as.
    """
    return next(tensor for tensor in tensors if tensor is not None)


@triton.jit
def hadamard(x, SIZE: tl.constexpr, LOG_BLOCK: tl.constexpr):
    """Normalised Sylvester-Hadamard transform of each run of 2^LOG_BLOCK entries of x (SIZE,) fp32."""
    for i in tl.static_range(LOG_BLOCK):
        y = tl.permute(tl.reshape(x, (SIZE // (2 << i), 2, 1 << i)), (0, 2, 1))
        a, b = tl.split(y)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))
    # 2^(-LOG/2) without a square root at run time: a power of two, times sqrt(1/2) where LOG is odd.
    scale = 1.0 / (1 << (LOG_BLOCK // 2))
    if LOG_BLOCK % 2:
        scale = scale * 0.7071067811865476
    return x * tl.full((), scale, tl.float32)


@triton.jit
def load_rotated(
    x_ptr,  # (K,) of one token
    norm_ptr,  # (K,)
    gate_ptr,  # (K,) of one token
    perm_ptr,  # (K,) int16 or int32
    signs_ptr,  # (ceil(K / 8),) uint8
    start, limit, rotated,
    K: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr, LOG_BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr, HAS_SIGNS: tl.constexpr,
):  # fmt: skip
    """Load entries [start, start + SIZE) of the rotated activation, fp32, zero from `limit` on.

    A gate (ACTIVATION, if not "") or a norm (HAS_NORM) comes first; see `prologue/reference.py`. `rotated` is False for
    the leading unrotated columns; the block 2^LOG_BLOCK divides SIZE.
    """
    k = start + tl.arange(0, SIZE)
    inside = k < limit
    # Loads that depend on no other come first: these tensors come from memory, not from L2.
    source = k
    if HAS_PERM:
        source = tl.load(perm_ptr + k, mask=inside, other=0).to(tl.int32)
    if HAS_SIGNS:
        byte = tl.load(signs_ptr + k // 8, mask=inside, other=0).to(tl.int32)
    if HAS_NORM:
        weight = tl.load(norm_ptr + k, mask=inside, other=0.0)
    # Without the barrier, ptxas would move these loads to their first use, behind the wait for x.
    tl.debug_barrier()
    if HAS_NORM:
        scale = inverse_rms(x_ptr, K, EPS)
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        x *= activated(tl.load(gate_ptr + source, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if HAS_NORM:
        x *= scale * weight.to(tl.float32)
    if LOG_BLOCK > 0:
        y = x
        if HAS_SIGNS:
            y = tl.where((byte >> (k % 8)) & 1 != 0, -x, x)
        y = hadamard(y, SIZE, LOG_BLOCK)
        x = tl.where(rotated, y, x)
    return x


@triton.jit
def high_bit_offset(code):
    """Bit of code `code` (0..31) in its word of the plane of single bits."""
    return 8 * ((code >> 2) & 3) + 4 * (code >> 4) + (code & 3)


@triton.jit
def load_zeros(
    zeros_ptr,  # flattened (N, G) codes, packed
    index, inside,
    COUNT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Zero points `code + 1/2`, fp32, of the flattened indices `index` (int32, not negative) of COUNT = N * G."""
    CODES: tl.constexpr = 32 // WIDTH
    LOG_CODES: tl.constexpr = 4 if WIDTH == 2 else 3 if WIDTH == 4 else 2
    word = tl.load(zeros_ptr + (index >> LOG_CODES), mask=inside, other=0)
    code = (word >> ((index & (CODES - 1)) * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        high = tl.load(zeros_ptr + (COUNT + 31) // 32 * 2 + (index >> 5), mask=inside, other=0)
        code = code | (((high >> high_bit_offset(index & 31)) & 1) << 2)
    return code.to(tl.float32) + 0.5


@triton.jit
def load_integers(
    tile_ptr,  # (BLOCK_N, ROW) int32, the first row of a tile
    rows, start, inside,
    WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of columns [start, start + BLOCK_K) as int32 (BLOCK_N, BLOCK_K); start is a multiple of 32."""
    CODES: tl.constexpr = 32 // WIDTH
    ROW: tl.constexpr = WORDS * BITS // WIDTH
    row = tile_ptr + rows[:, None] * ROW
    w = start // CODES + tl.arange(0, BLOCK_K // CODES)
    inside = inside[:, None] & (w < WORDS)[None, :]
    c = tl.arange(0, CODES)
    main = tl.load(row + w[None, :], mask=inside, other=0)
    codes = (main[:, :, None] >> (WIDTH * c)[None, None, :]) & ((1 << WIDTH) - 1)
    if BITS == 3:
        # Loaded for each word of the main plane, so twice: in one layout, threads exchange nothing.
        high = tl.load(row + WORDS + (w >> 1)[None, :], mask=inside, other=0) >> (4 * (w & 1))[None, :]
        codes |= ((high[:, :, None] >> (8 * (c >> 2) + (c & 3))[None, None, :]) & 1) << 2
    return tl.reshape(codes, (BLOCK_N, BLOCK_K))


@triton.jit
def load_codes(
    tile_ptr,  # (BLOCK_N, ROW) int32, the first row of a tile
    rows, start, inside,
    WORDS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`load_integers` as fp32."""
    codes = load_integers(tile_ptr, rows, start, inside, WORDS, BITS, WIDTH, BLOCK_N, BLOCK_K)
    # 2^23 + code by its bits, then minus 2^23: two operations at full rate, where a conversion would run at less.
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def by_column(values, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Repeat (BLOCK_N, GROUPS) to (BLOCK_N, BLOCK_K)."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_N, GROUPS, BLOCK_K // GROUPS)), (BLOCK_N, BLOCK_K))


@triton.jit
def dot4(a, b, acc, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """acc + the dot product of four unsigned bytes of `a` and four bytes of `b`, signed or not, all int32.

    NATIVE is one dp4a instruction; otherwise plain arithmetic, for the interpreter and for other vendors' devices.
    """
    if NATIVE and SIGNED:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    elif NATIVE:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for j in tl.static_range(4):
            byte = (b >> (8 * j)) & 255
            if SIGNED:
                byte = byte - 2 * (byte & 128)
            acc += ((a >> (8 * j)) & 255) * byte
    return acc


@triton.jit
def tile_of(program, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First token and first output feature of a program's tile of (M, N).

    Neighbouring programs share weights: GROUP_M tiles of tokens for each tile of features, so that L2 serves them.
    """
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group_m = program // (GROUP_M * n_tiles) * GROUP_M
    height = min(m_tiles - group_m, GROUP_M)
    inner = program % (GROUP_M * n_tiles)
    return (group_m + inner % height) * BLOCK_M, inner // height * BLOCK_N


@triton.jit
def add_branch(
    acc,  # (BLOCK_N, BLOCK_M) fp32
    bias_ptr,  # (N,)
    latent_ptr,  # (PARTS, M, R)
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    m, n, M,
    N: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, PART_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, dtype: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + B t + b for tokens `m` and output features `n`, factors multiplied in `dtype`."""
    m_inside, n_inside = m < M, n < N
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
        acc = tl.dot(up.to(dtype), tl.trans(latent.to(dtype)), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_inside, other=0.0).to(tl.float32)[:, None]
    return acc
