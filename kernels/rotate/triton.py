"""`lopro::rotate` in one launch, with a prologue and the partial sums of A x'."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.fragments import reordered
from lopro_fx.kernels.tiles import load_rotated


@triton.jit
def rotate_kernel(
    x_ptr,  # (M, K), rows X_ROW apart
    norm_ptr,  # (K,)
    gate_ptr,  # (M, K), rows GATE_ROW apart
    perm_ptr,  # (K,) int16 or int32
    signs_ptr,  # (ceil(K / 8),) uint8
    down_ptr,  # (R, K) int8 or fp16
    down_scale_ptr,  # (R,) fp16
    y_ptr,  # (M, Y_ROW), in the order of `fragments.py` for WIDTH and STEP, or as it is for WIDTH 0
    latent_ptr,  # (PARTS, M, R) fp32
    M,
    K: tl.constexpr, R: tl.constexpr, SKIP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    LOG_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, X_ROW: tl.constexpr,
    Y_ROW: tl.constexpr, GATE_ROW: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr, HAS_SIGNS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK columns of one token, either of the SKIP leading ones or of those after them."""
    # Neighbouring programs take one token: a permutation makes each of them read all of its row, which caches hold.
    m = (tl.program_id(0) // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) % CHUNKS
    SKIPPED: tl.constexpr = (SKIP + CHUNK - 1) // CHUNK
    rotated = chunk >= SKIPPED
    start = tl.where(rotated, SKIP + (chunk - SKIPPED) * CHUNK, chunk * CHUNK)
    limit = tl.where(rotated, K, SKIP)
    k = start + tl.arange(0, CHUNK)
    # Rows of A are prefetched before the rotation: its barriers would otherwise hold the loads back. A few at a time:
    # all of A would not fit the registers beside a wide chunk.
    r = tl.arange(0, BLOCK_R)
    if R > 0:
        a = tl.load(down_ptr + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < limit)[None, :], other=0)
    y = load_rotated(
        x_ptr + m * X_ROW, norm_ptr, gate_ptr + m * GATE_ROW, perm_ptr, signs_ptr, start, limit, rotated,
        K, EPS, CHUNK, LOG_BLOCK, ACTIVATION, HAS_NORM, HAS_PERM, HAS_SIGNS,
    )  # fmt: skip
    for first in tl.static_range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        rows = a.to(tl.float32)
        if first + BLOCK_R < R:
            next_inside = (r + BLOCK_R < R)[:, None] & (k < limit)[None, :]
            a = tl.load(down_ptr + (r + BLOCK_R)[:, None] * K + k[None, :], mask=next_inside, other=0)
        part = tl.sum(rows * y[None, :], axis=1)
        if HAS_SCALE:
            part *= tl.load(down_scale_ptr + r, mask=r < R, other=0.0).to(tl.float32)
        tl.store(latent_ptr + (chunk * M + m) * R + r, part, mask=r < R)
    result, end = y.to(y_ptr.dtype.element_ty), limit
    if WIDTH > 0:
        # Chunks and the leading columns are whole steps; zeros fill the last one up.
        result, end = reordered(result, WIDTH, STEP, CHUNK), tl.cdiv(limit, STEP) * STEP
    tl.store(y_ptr + m * Y_ROW + k, result, mask=k < end)
