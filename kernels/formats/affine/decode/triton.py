"""Gemv of decoding: y = Q̂ x' + B (A x') + b for a few tokens, bound by the bandwidth of reading packed weights.

`prepare_kernel` applies a prologue, gathers and rotates. It writes x' as 16-bit fixed point with one scale a group, and
the partial sums of A x'. Each value is split into a signed high and an unsigned low byte, in the layout of the weights'
words. `product_kernel` then needs a shift, a mask and two four-way dot products of bytes for four weights. The integer
sums of a group are exact. Fixed point rounds x' by about 2^-16 of the group's largest entry at most, less than bf16 or
fp16 do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.activation.triton import integers
from lopro_fx.kernels.tiles import dot4, load_rotated, load_zeros


@triton.jit
def prepare_kernel(
    x_ptr,  # (M, K), rows X_ROW apart
    norm_ptr,  # (K,)
    gate_ptr,  # (M, K), rows GATE_ROW apart
    perm_ptr,  # (K,) int16 or int32
    signs_ptr,  # (ceil(K / 8),) uint8
    down_ptr,  # (R, K) int8 or fp16
    words_ptr,  # (M, 2, FIELDS, WORDS) int32: high bytes, low bytes
    scale_ptr,  # (M, 2, GROUPS) fp32: step of the fixed point, and step times sum of a group
    latent_ptr,  # (CHUNKS, M, R) fp32 partial sums of A x'
    M,
    K: tl.constexpr, R: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, LOG_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, X_ROW: tl.constexpr, GATE_ROW: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr, HAS_SIGNS: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK columns of one token."""
    m = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = chunk * CHUNK
    if R > 0:
        # Prefetched before the rotation: its barriers would otherwise hold the load back.
        r, k = tl.arange(0, BLOCK_R), start + tl.arange(0, CHUNK)
        a = tl.load(down_ptr + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0)
    x = load_rotated(
        x_ptr + m * X_ROW, norm_ptr, gate_ptr + m * GATE_ROW, perm_ptr, signs_ptr, start, K, True,
        K, EPS, CHUNK, LOG_BLOCK, ACTIVATION, HAS_NORM, HAS_PERM, HAS_SIGNS,
    )  # fmt: skip
    parts = tl.reshape(x, (CHUNK // GROUP, GROUP))
    fixed, step = integers(parts, 32767)
    g = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    to_scale = scale_ptr + m * (2 * GROUPS) + g
    tl.store(to_scale, step, mask=g < GROUPS)
    tl.store(to_scale + GROUPS, step * tl.sum(fixed, axis=1).to(tl.float32), mask=g < GROUPS)

    # Byte j of field i of a word is code FIELDS * j + i.
    bytes_ = tl.reshape(fixed, (CHUNK // (4 * FIELDS), 4, FIELDS))
    place = 8 * tl.arange(0, 4)[None, :, None]
    high = tl.sum(((bytes_ >> 8) & 255) << place, axis=1)
    low = tl.sum((bytes_ & 255) << place, axis=1)
    w = chunk * (CHUNK // (4 * FIELDS)) + tl.arange(0, CHUNK // (4 * FIELDS))
    i = tl.arange(0, FIELDS)
    to_words = words_ptr + m * (2 * FIELDS * WORDS) + i[None, :] * WORDS + w[:, None]
    tl.store(to_words, high, mask=(w < WORDS)[:, None])
    tl.store(to_words + FIELDS * WORDS, low, mask=(w < WORDS)[:, None])

    if R > 0:
        part = tl.sum(a.to(tl.float32) * x[None, :], axis=1)
        tl.store(latent_ptr + (chunk * M + m) * R + r, part, mask=r < R)


@triton.jit
def product_kernel(
    words_ptr,  # (M, 2, FIELDS, WORDS) int32
    scale_ptr,  # (M, 2, GROUPS) fp32
    latent_ptr,  # (CHUNKS, M, R) fp32
    codes_ptr,  # (N, WORDS * BITS / WIDTH) int32
    scales_ptr,  # (N, WEIGHT_GROUPS) fp16
    zeros_ptr,  # packed (N, WEIGHT_GROUPS)
    bias_ptr,  # (N,)
    down_scale_ptr,  # (R,) fp16
    core_ptr,  # (R, R) fp16
    up_ptr,  # (N, R) int8 or fp16
    up_scale_ptr,  # (N / PART_ROWS, R) fp16
    residual_ptr,  # (M, N)
    y_ptr,  # (SPLITS, M, N)
    M,
    N: tl.constexpr, R: tl.constexpr, PART_ROWS: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, WORDS_IN_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    WEIGHT_GROUPS: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOWN_SCALE: tl.constexpr, HAS_CORE: tl.constexpr,
    HAS_UP_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of one token, over one of SPLITS parts of the columns."""
    # A tile of weights starts at a 64-bit address; inside it 32 bits are enough.
    first = tl.program_id(0) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    n = first + rows
    split = tl.program_id(1)
    m = tl.program_id(2).to(tl.int64)
    n_inside = (n < N)[:, None]
    BLOCK_G: tl.constexpr = BLOCK_W // WORDS_IN_GROUP
    ROW: tl.constexpr = WORDS * BITS // WIDTH
    codes_ptr += first.to(tl.int64) * ROW
    acc = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    # Operands of the epilogue are prefetched, in flight while the loop runs; only the first part adds them.
    n_last = (n < N) & (split == 0)
    if R > 0:
        r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_CHUNKS)
        up_inside = n_last[:, None] & (r < R)[None, :]
        up = tl.load(up_ptr + n[:, None] * R + r[None, :], mask=up_inside, other=0)
        parts_inside = (c < CHUNKS)[:, None] & (r < R)[None, :]
        parts = tl.load(latent_ptr + (c[:, None] * M + m) * R + r[None, :], mask=parts_inside, other=0.0)
        if HAS_CORE:
            square = (r < R)[:, None] & (r < R)[None, :]
            core = tl.load(core_ptr + r[:, None] * R + r[None, :], mask=square, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + m * N + n, mask=n_last, other=0.0)
    tiles = tl.cdiv(tl.cdiv(WORDS, BLOCK_W), SPLITS)
    # Pipelined: the next steps are copied to shared memory meanwhile; otherwise every step would wait for memory.
    for tile in tl.range(split * tiles, min((split + 1) * tiles, tl.cdiv(WORDS, BLOCK_W)), num_stages=STAGES):
        w = tile * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = n_inside & (w < WORDS)[None, :]
        codes = tl.load(codes_ptr + rows[:, None] * ROW + w[None, :], mask=inside, other=0)
        high_bits = codes
        if BITS == 3:
            # Two words of the main plane share one of the high plane; the second takes its bits four places up.
            p = tile * (BLOCK_W // 2) + tl.arange(0, BLOCK_W // 2)
            # Adds 0, but hides that the address is a multiple of 16 bytes: with a vectorised load of four words,
            # threads would have to exchange two of them. Now each loads the two of its four main-plane words.
            p += tl.where(split < 0, 2, 0)
            pairs = n_inside & (p < WORDS // 2)[None, :]
            shared = tl.load(codes_ptr + rows[:, None] * ROW + WORDS + p[None, :], mask=pairs, other=0)
            high_bits = tl.interleave(shared, shared >> 4)
        x_at = words_ptr + m * (2 * FIELDS * WORDS) + w
        upper = tl.zeros((BLOCK_N, BLOCK_W), tl.int32)
        lower = tl.zeros((BLOCK_N, BLOCK_W), tl.int32)
        for i in tl.static_range(FIELDS):
            x_high = tl.load(x_at + i * WORDS, mask=w < WORDS, other=0)[None, :]
            x_low = tl.load(x_at + (FIELDS + i) * WORDS, mask=w < WORDS, other=0)[None, :]
            if BITS == 2:
                four = (codes >> (2 * i)) & 0x03030303
            elif BITS == 3:
                four = ((codes >> (2 * i)) & 0x03030303) | (((high_bits >> i) & 0x01010101) << 2)
            elif BITS == 4:
                four = (codes >> (4 * i)) & 0x0F0F0F0F
            else:
                four = codes
            x_high, x_low = tl.broadcast_to(x_high, four.shape), tl.broadcast_to(x_low, four.shape)
            upper = dot4(four, x_high, upper, True, NATIVE)
            lower = dot4(four, x_low, lower, False, NATIVE)
        whole = tl.sum(tl.reshape(upper * 256 + lower, (BLOCK_N, BLOCK_G, WORDS_IN_GROUP)), axis=2)

        g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
        g_inside = n_inside & (g < GROUPS)[None, :]
        weight_g = g if WEIGHT_GROUPS > 1 else g * 0
        at = n[:, None] * WEIGHT_GROUPS + weight_g[None, :]
        scale = tl.load(scales_ptr + at, mask=g_inside, other=0.0).to(tl.float32)
        zero = load_zeros(zeros_ptr, at, g_inside, N * WEIGHT_GROUPS, BITS, WIDTH)
        step = tl.load(scale_ptr + m * (2 * GROUPS) + g, mask=g < GROUPS, other=0.0)
        total = tl.load(scale_ptr + m * (2 * GROUPS) + GROUPS + g, mask=g < GROUPS, other=0.0)
        acc += scale * (whole.to(tl.float32) * step[None, :] - zero * total[None, :])
    y = tl.sum(acc, axis=1)
    if R > 0:
        latent = tl.sum(parts, axis=0)
        if HAS_DOWN_SCALE:
            latent *= tl.load(down_scale_ptr + r, mask=r < R, other=0.0).to(tl.float32)
        if HAS_CORE:
            latent = tl.sum(core.to(tl.float32) * latent[None, :], axis=1)
        up = up.to(tl.float32)
        if HAS_UP_SCALE:
            part = (n // PART_ROWS)[:, None]
            up *= tl.load(up_scale_ptr + part * R + r[None, :], mask=up_inside, other=0.0).to(tl.float32)
        y += tl.sum(up * latent[None, :], axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_last, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += residual.to(tl.float32)
    tl.store(y_ptr + (split * M + m) * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)
