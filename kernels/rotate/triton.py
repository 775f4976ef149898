"""`lopro::rotate` in one launch: gather, signs, block Hadamard, leading columns passed through."""

from __future__ import annotations

import triton
import triton.language as tl

from lopro_fx.kernels.tiles import load_rotated


@triton.jit
def rotate_kernel(
    x_ptr,  # (M, K)
    perm_ptr,  # (K,) int16 or int32
    signs_ptr,  # (ceil(K / 8),) uint8
    y_ptr,  # (M, K)
    K: tl.constexpr, SKIP: tl.constexpr, CHUNK: tl.constexpr, LOG_BLOCK: tl.constexpr,
    HAS_PERM: tl.constexpr, HAS_SIGNS: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK columns of one token, either of the SKIP leading ones or of those after them."""
    m = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    SKIPPED: tl.constexpr = (SKIP + CHUNK - 1) // CHUNK
    rotated = chunk >= SKIPPED
    start = tl.where(rotated, SKIP + (chunk - SKIPPED) * CHUNK, chunk * CHUNK)
    limit = tl.where(rotated, K, SKIP)
    y = load_rotated(x_ptr + m * K, perm_ptr, signs_ptr, start, limit, rotated, CHUNK, LOG_BLOCK, HAS_PERM, HAS_SIGNS)
    k = start + tl.arange(0, CHUNK)
    tl.store(y_ptr + m * K + k, y.to(y_ptr.dtype.element_ty), mask=k < limit)
