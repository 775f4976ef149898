"""Shared by the Triton kernels of experts.

A *pair* is a token and one of its experts, in the order of `ids`; SLOTS pairs belong to a token. Where an id is none of
an expert, the row is NaN: to raise an error, the host would have to wait for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_of(id_ptr, EXPERTS: tl.constexpr):
    """The expert of a pair, int64, and whether there is one; 0 where there is none."""
    expert = tl.load(id_ptr).to(tl.int64)
    known = (expert >= 0) & (expert < EXPERTS)
    return tl.where(known, expert, 0), known


@triton.jit
def cell_of(cells_ptr, expert, HAS_CELLS: tl.constexpr):
    """Row and column of an expert in the grid, int64; without a grid each has its own."""
    row, column = expert, expert
    if HAS_CELLS:
        row = tl.load(cells_ptr + 2 * expert).to(tl.int64)
        column = tl.load(cells_ptr + 2 * expert + 1).to(tl.int64)
    return row, column


@triton.jit
def own_kernel(
    latent_ptr,  # (tokens, WIDTH)
    ids_ptr,  # (pairs,)
    cells_ptr,  # (EXPERTS, 2) int32
    core_ptr,  # (EXPERTS, R, R) fp16
    own_ptr,  # (pairs, R) fp32
    SLOTS: tl.constexpr, EXPERTS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr, HAS_CELLS: tl.constexpr, HAS_CORE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_O latents of one pair."""
    pair = tl.program_id(0).to(tl.int64)
    expert, _ = expert_of(ids_ptr + pair, EXPERTS)
    row = expert
    if HAS_CELLS:
        row = tl.load(cells_ptr + 2 * expert).to(tl.int64)
    latent_ptr += pair // SLOTS * WIDTH + row * R
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if HAS_CORE:
        r = tl.arange(0, BLOCK_R)
        inside = (o < R)[:, None] & (r < R)[None, :]
        core = tl.load(core_ptr + expert * (R * R) + o[:, None] * R + r[None, :], mask=inside, other=0.0)
        latent = tl.load(latent_ptr + r, mask=r < R, other=0.0).to(tl.float32)
        own = tl.sum(core.to(tl.float32) * latent[None, :], axis=1)
    else:
        own = tl.load(latent_ptr + o, mask=o < R, other=0.0).to(tl.float32)
    tl.store(own_ptr + pair * R + o, own, mask=o < R)


@triton.jit
def tile_of_pairs(
    starts_ptr,  # (EXPERTS + 1,) int32
    tile, pairs,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Expert of a tile of at most BLOCK_M sorted pairs, place of its first pair, and pairs from there to the expert's
    last.

    Experts have tiles one after the other; ids that are none of an expert count as expert EXPERTS. Tiles after all of
    them have no pairs.
    """
    e = tl.arange(0, BLOCK_E)
    first = tl.load(starts_ptr + e, mask=e <= EXPERTS, other=pairs)
    last = tl.load(starts_ptr + e + 1, mask=e < EXPERTS, other=pairs)
    tiles = tl.cdiv(last - first, BLOCK_M)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    mine = e == expert
    place = tl.sum(tl.where(mine, first + (tile - ends + tiles) * BLOCK_M, 0), axis=0)
    return expert, place, tl.sum(tl.where(mine, last, 0), axis=0) - place


@triton.jit
def store_nan(at, inside):
    """NaN at pointers, where `inside`."""
    nothing = tl.full(inside.shape, float("nan"), tl.float32)
    tl.store(at, nothing.to(at.dtype.element_ty), mask=inside)
