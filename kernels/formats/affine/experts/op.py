"""`lopro::packed_experts` and `lopro::packed_experts_site` by Triton; the host never waits for the device."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.experts.site import experts_site
from lopro_fx.kernels.routed.choice import DECODE_PAIRS, choose_tile
from lopro_fx.kernels.routed.reference import require_fit


def packed_experts(
    x: Tensor, ids: Tensor, slots: int, codes: Tensor, scales: Tensor, zeros: Tensor, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """`definition.experts` by gemv or gemm."""
    from lopro_fx.kernels.formats.affine.decode.device import decode_prepare
    from lopro_fx.kernels.formats.affine.experts.device import experts_matmul
    from lopro_fx.kernels.formats.affine.linear.device import step_of
    from lopro_fx.kernels.fragments import ordered
    from lopro_fx.kernels.routed.device import own_latents, sorted_pairs
    from lopro_fx.kernels.tiles import main_width

    (experts, n, _), pairs = scales.shape, ids.shape[0]
    require_fit(x, ids, experts, x.shape[-1], slots)
    if dispatch.at_most(pairs, 0):
        return x.new_empty(0, n)
    x, ids = x.contiguous(), ids.contiguous()
    if latent is not None:
        latent = latent.contiguous()
    if dispatch.at_most(pairs, DECODE_PAIRS):
        words, steps, _ = decode_prepare(x, None, None, 1, None, bits, group_size)
        return _gemv(words, steps, latent, ids, slots, codes, scales, zeros, None, up, up_scale, cells, core, bits,
                     group_size, x)  # fmt: skip
    own = None
    if latent is not None and up is not None:
        own = own_latents(latent, ids, slots, up.shape[2], experts, cells, core)
    rows = ordered(x, main_width(bits), step_of(x.dtype, bits, group_size))
    tile = choose_tile(pairs, experts, dispatch.capability(x.device))
    return experts_matmul(rows, own, *sorted_pairs(ids, experts), slots, codes, scales, zeros, up, up_scale, cells,
                          bits, group_size, tile)  # fmt: skip


def packed_experts_site(
    x: Tensor, ids: Tensor, slots: int, perm: Tensor | None, signs: Tensor | None, block: int, skip: int,
    down: Tensor | None, down_scale: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, up: Tensor | None,
    up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: int, group_size: int,
    gate: Tensor | None = None, activation: str = "",
) -> Tensor:  # fmt: skip
    """`definition.experts_site` of few pairs in two launches; of many, rotation and projection have their own."""

    def fused(words: Tensor, steps: Tensor, latent: Tensor | None, ids: Tensor) -> Tensor:
        return _gemv(words, steps, latent, ids, slots, codes, scales, zeros, down_scale, up, up_scale, cells, core,
                     bits, group_size, x)  # fmt: skip

    def apart(x: Tensor, latent: Tensor | None) -> Tensor:
        return packed_experts(x, ids, slots, codes, scales, zeros, latent, up, up_scale, cells, core, bits, group_size)

    return experts_site(x, ids, slots, scales.shape[0], perm, signs, block, skip, down, down_scale, up, cells, bits,
                        group_size, gate, activation, fused, apart)  # fmt: skip


def _gemv(
    words: Tensor, steps: Tensor, latent: Tensor | None, ids: Tensor, slots: int, codes: Tensor, scales: Tensor,
    zeros: Tensor, down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None,
    core: Tensor | None, bits: int, group_size: int, x: Tensor,
) -> Tensor:  # fmt: skip
    from lopro_fx.kernels.formats.affine.decode.device import choose_splits
    from lopro_fx.kernels.formats.affine.experts.device import experts_product

    splits = choose_splits(ids.shape[0] * scales.shape[1], words.shape[-1], dispatch.processors(x.device))
    return experts_product(words, steps, latent, ids, slots, codes, scales, zeros, down_scale, up, up_scale, cells,
                           core, bits, group_size, splits, x.dtype)  # fmt: skip
