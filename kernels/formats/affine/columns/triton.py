"""The loops for a GPU: a program takes its rows through a block of columns in registers, one column at a time.

Columns of a tile are its first dimension. A single one is read from registers as a masked sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding it rounds a number below 2^22 to an integer, halves to even.
_SHIFT = tl.constexpr(12582912.0)
# Of `rounded_scale`: the bits cut off, their half less one, and a mask of those kept.
_CUT, _HALF, _KEEP = tl.constexpr(13), tl.constexpr((1 << 12) - 1), tl.constexpr(-(1 << 13))


@triton.jit
def _rounded(x, TOP: tl.constexpr):
    """Code of x: the nearest integer from 0 to TOP."""
    return (tl.minimum(tl.maximum(x, 0.0), TOP) + _SHIFT) - _SHIFT


@triton.jit
def _rounded_scale(x):
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + _HALF + ((bits >> _CUT) & 1)) & _KEEP
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _column(tile, here):
    """The column of a tile where `here` is true."""
    return tl.sum(tl.where(here, tile, 0.0), 0)


@triton.jit
def fit_kernel(
    block_ptr,  # (WIDTH, M) fp32
    weights_ptr,  # (WIDTH,) fp32
    scale_ptr, zero_ptr,  # (M,) fp32
    M, STEPS,
    WIDTH: tl.constexpr, TOP: tl.constexpr, SHRINK: tl.constexpr, MIN_SCALE: tl.constexpr, MAX_SCALE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: the grids of BLOCK_M rows. Blocks of BLOCK_W columns are read again for each clipping range."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, offsets = rows < M, tl.arange(0, BLOCK_W)
    low, high = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, WIDTH, BLOCK_W):
        columns = first + offsets
        mask = (columns < WIDTH)[:, None] & inside[None, :]
        x = tl.load(block_ptr + columns[:, None] * M + rows[None, :], mask, 0.0)
        low, high = tl.minimum(low, tl.min(x, 0)), tl.maximum(high, tl.max(x, 0))
    best, best_scale, best_zero = low, low, low
    for step in range(STEPS + 1):
        keep = 1.0 - SHRINK * step / tl.maximum(STEPS, 1)
        bottom = low * keep
        scale = (high * keep - bottom) / TOP
        scale = _rounded_scale(tl.minimum(tl.maximum(scale, MIN_SCALE), MAX_SCALE))
        zero = _rounded(-bottom / scale - 0.5, TOP) + 0.5
        inverse, error = 1.0 / scale, tl.zeros((BLOCK_M,), tl.float32)
        for first in range(0, WIDTH, BLOCK_W):
            columns = first + offsets
            mask = (columns < WIDTH)[:, None] & inside[None, :]
            x = tl.load(block_ptr + columns[:, None] * M + rows[None, :], mask, 0.0)
            weight = tl.load(weights_ptr + columns, columns < WIDTH, 0.0)
            off = (_rounded(x * inverse[None, :] + zero[None, :], TOP) - zero[None, :]) * scale[None, :] - x
            error += tl.sum(weight[:, None] * off * off, 0)
        better = (error < best) | (step == 0)
        best = tl.where(better, error, best)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
    tl.store(scale_ptr + rows, best_scale, inside)
    tl.store(zero_ptr + rows, best_zero, inside)


@triton.jit
def round_kernel(
    columns_ptr, target_ptr,  # (WIDTH, M) fp32
    upper_ptr,  # (WIDTH, WIDTH) fp32
    scale_ptr, zero_ptr,  # fp32: a row of M for each column, STRIDE apart
    codes_ptr,  # (WIDTH, M) uint8
    error_ptr,  # (WIDTH, M) fp32
    M, STRIDE,
    WIDTH: tl.constexpr, TOP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of all columns."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, places = rows < M, tl.arange(0, BLOCK_W)
    mask = (places < WIDTH)[:, None] & inside[None, :]
    target = tl.load(target_ptr + places[:, None] * M + rows[None, :], mask, 0.0)
    for j in range(WIDTH):
        scale = tl.load(scale_ptr + j * STRIDE + rows, inside, 1.0)
        zero = tl.load(zero_ptr + j * STRIDE + rows, inside, 0.0)
        code = _rounded(_column(target, (places == j)[:, None]) * (1.0 / scale) + zero, TOP)
        error = tl.load(columns_ptr + j * M + rows, inside, 0.0) - (code - zero) * scale
        tl.store(codes_ptr + j * M + rows, code.to(tl.uint8), inside)
        tl.store(error_ptr + j * M + rows, error, inside)
        # Zeros on the left of the diagonal leave the columns before alone.
        factor = tl.load(upper_ptr + j * WIDTH + places, places < WIDTH, 0.0)
        target += factor[:, None] * error[None, :]


@triton.jit
def _move_codes(codes, error, slope, scale, gram_ptr, gram_stride, WIDTH, TOP: tl.constexpr, BLOCK_W: tl.constexpr):
    places = tl.arange(0, BLOCK_W)
    for j in range(WIDTH):
        here = (places == j)[:, None]
        row = tl.load(gram_ptr + j * gram_stride + places, places < WIDTH, 0.0)
        own = tl.load(gram_ptr + j * gram_stride + j)
        old = _column(codes, here)
        code = _rounded(_column(slope, here) / own / scale + old, TOP)
        step = (old - code) * scale
        codes = tl.where(here, code[None, :], codes)
        error = tl.where(here, error + step[None, :], error)
        slope += row[:, None] * step[None, :]
    return codes, error, slope


@triton.jit
def descend_kernel(
    codes_ptr,  # (WIDTH, M) uint8, changed
    error_ptr,  # (WIDTH, M) fp32, changed
    slope_ptr,  # (WIDTH, M) fp32
    gram_ptr, gram_stride,  # fp32, the group's part of H
    scale_ptr,  # (M,) fp32, changed
    zero_ptr,  # (M,) fp32
    M, WIDTH, TOP: tl.constexpr, MIN_SCALE: tl.constexpr, MAX_SCALE: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one group of columns, whose codes are visited before and after the scale."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, places = rows < M, tl.arange(0, BLOCK_W)
    mask = (places < WIDTH)[:, None] & inside[None, :]
    at = places[:, None] * M + rows[None, :]
    codes = tl.load(codes_ptr + at, mask, 0).to(tl.float32)
    error, slope = tl.load(error_ptr + at, mask, 0.0), tl.load(slope_ptr + at, mask, 0.0)
    scale, zero = tl.load(scale_ptr + rows, inside, 1.0), tl.load(zero_ptr + rows, inside, 0.0)
    codes, error, slope = _move_codes(codes, error, slope, scale, gram_ptr, gram_stride, WIDTH, TOP, BLOCK_W)
    if SCALES:
        levels = tl.where((places < WIDTH)[:, None], codes - zero[None, :], 0.0)
        moved = tl.zeros((BLOCK_W, BLOCK_M), tl.float32)
        for j in range(WIDTH):
            row = tl.load(gram_ptr + j * gram_stride + places, places < WIDTH, 0.0)
            moved += row[:, None] * _column(levels, (places == j)[:, None])[None, :]
        normal, down = tl.sum(moved * levels, 0), tl.sum(slope * levels, 0)
        new = _rounded_scale(tl.maximum(scale + down / tl.maximum(normal, 1e-30), 0.0))
        step = new - scale
        # Rounding may take the step past the minimum.
        better = (step * (step * normal - 2 * down) < 0) & (new >= MIN_SCALE) & (new <= MAX_SCALE)
        step = tl.where(better, step, 0.0)
        scale += step
        error -= levels * step[None, :]
        slope -= moved * step[None, :]
        tl.store(scale_ptr + rows, scale, inside)
        codes, error, slope = _move_codes(codes, error, slope, scale, gram_ptr, gram_stride, WIDTH, TOP, BLOCK_W)
    tl.store(codes_ptr + at, codes.to(tl.uint8), mask)
    tl.store(error_ptr + at, error, mask)
