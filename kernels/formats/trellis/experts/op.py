"""`lopro::trellis_experts` by Triton."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.routed.choice import DECODE_PAIRS, choose_tile
from lopro_fx.kernels.routed.reference import require_fit


def trellis_experts(
    x: Tensor, ids: Tensor, slots: int, scales: Tensor, codes: Tensor, latent: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: float, columns: int, window: int,
    strip: int,
) -> Tensor:  # fmt: skip
    """`definition.experts` by gemv or gemm; the host never waits for the device."""
    from lopro_fx.kernels.formats.trellis.decode.device import choose_splits, prepare
    from lopro_fx.kernels.formats.trellis.experts.device import matmul, product
    from lopro_fx.kernels.routed.device import own_latents, sorted_pairs

    (experts, n), pairs = scales.shape, ids.shape[0]
    require_fit(x, ids, experts, x.shape[-1], slots)
    if not pairs:
        return x.new_empty(0, n)
    x, ids, own = x.contiguous(), ids.contiguous(), None
    if latent is not None and up is not None and up.shape[2]:
        own = own_latents(latent.contiguous(), ids, slots, up.shape[2], experts, cells, core)
    weight = (scales, codes, up, up_scale, cells, round(bits * columns), columns, window, strip)
    if pairs <= DECODE_PAIRS:
        words, steps, _ = prepare(x, None, None, 1, None)
        splits = choose_splits(pairs * n, steps.shape[2], columns, dispatch.processors(x.device))
        return product(words, steps, own, ids, slots, *weight, x.shape[1], splits, x.dtype)
    tile = choose_tile(pairs, experts, dispatch.capability(x.device))
    return matmul(x, own, *sorted_pairs(ids, experts), slots, *weight, tile)
