"""`lopro::packed_experts` by Triton."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.routed.choice import DECODE_PAIRS, choose_tile
from lopro_fx.kernels.routed.reference import require_fit


def packed_experts(
    x: Tensor, ids: Tensor, slots: int, codes: Tensor, scales: Tensor, zeros: Tensor, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """`definition.experts` by gemv or gemm; the host never waits for the device."""
    from lopro_fx.kernels.formats.affine.decode.device import choose_splits, decode_prepare
    from lopro_fx.kernels.formats.affine.experts.device import matmul, product
    from lopro_fx.kernels.formats.affine.linear.device import step_of
    from lopro_fx.kernels.fragments import ordered
    from lopro_fx.kernels.routed.device import own_latents, sorted_pairs
    from lopro_fx.kernels.tiles import main_width

    (experts, n, _), pairs = scales.shape, ids.shape[0]
    require_fit(x, ids, experts, x.shape[-1], slots)
    if not pairs:
        return x.new_empty(0, n)
    x, ids, own = x.contiguous(), ids.contiguous(), None
    if latent is not None and up is not None and up.shape[2]:
        own = own_latents(latent.contiguous(), ids, slots, up.shape[2], experts, cells, core)
    weight = (codes, scales, zeros, up, up_scale, cells, bits, group_size)
    if pairs <= DECODE_PAIRS:
        words, steps, _ = decode_prepare(x, None, None, 1, None, bits, group_size)
        splits = choose_splits(pairs * n, words.shape[-1], dispatch.processors(x.device))
        return product(words, steps, own, ids, slots, *weight, splits, x.dtype)
    rows = ordered(x, main_width(bits), step_of(x.dtype, bits, group_size))
    tile = choose_tile(pairs, experts, dispatch.capability(x.device))
    return matmul(rows, own, *sorted_pairs(ids, experts), slots, *weight, tile)
