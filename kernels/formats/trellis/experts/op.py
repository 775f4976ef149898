"""`lopro::trellis_experts` and `lopro::trellis_experts_site` by Triton; the host never waits for the device."""

from __future__ import annotations

from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.experts.site import experts_site
from lopro_fx.kernels.routed.choice import DECODE_PAIRS, choose_tile
from lopro_fx.kernels.routed.reference import require_fit


def trellis_experts(
    x: Tensor, ids: Tensor, slots: int, scales: Tensor, codes: Tensor, latent: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: float, columns: int, window: int,
    strip: int,
) -> Tensor:  # fmt: skip
    """`definition.experts` by gemv or gemm."""
    from lopro_fx.kernels.formats.trellis.decode.device import prepare
    from lopro_fx.kernels.formats.trellis.experts.device import experts_matmul
    from lopro_fx.kernels.routed.device import own_latents, sorted_pairs

    (experts, n), pairs = scales.shape, ids.shape[0]
    require_fit(x, ids, experts, x.shape[-1], slots)
    if dispatch.at_most(pairs, 0):
        return x.new_empty(0, n)
    x, ids = x.contiguous(), ids.contiguous()
    if latent is not None:
        latent = latent.contiguous()
    spec = (round(bits * columns), columns, window, strip)
    if dispatch.at_most(pairs, DECODE_PAIRS):
        words, steps, _ = prepare(x, None, None, 1, None)
        return _gemv(words, steps, latent, ids, slots, scales, codes, None, up, up_scale, cells, core, *spec, x)
    own = None
    if latent is not None and up is not None:
        own = own_latents(latent, ids, slots, up.shape[2], experts, cells, core)
    tile = choose_tile(pairs, experts, dispatch.capability(x.device))
    return experts_matmul(x, own, *sorted_pairs(ids, experts), slots, scales, codes, up, up_scale, cells, *spec, tile)


def trellis_experts_site(
    x: Tensor, ids: Tensor, slots: int, perm: Tensor | None, signs: Tensor | None, block: int, skip: int,
    down: Tensor | None, down_scale: Tensor | None, scales: Tensor, codes: Tensor, up: Tensor | None,
    up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None, bits: float, columns: int, window: int,
    strip: int, gate: Tensor | None = None, activation: str = "",
) -> Tensor:  # fmt: skip
    """`definition.experts_site`, as in the format "affine"."""

    def fused(words: Tensor, steps: Tensor, latent: Tensor | None, ids: Tensor) -> Tensor:
        spec = (round(bits * columns), columns, window, strip)
        return _gemv(words, steps, latent, ids, slots, scales, codes, down_scale, up, up_scale, cells, core, *spec, x)

    def apart(x: Tensor, latent: Tensor | None) -> Tensor:
        return trellis_experts(
            x, ids, slots, scales, codes, latent, up, up_scale, cells, core, bits, columns, window, strip
        )

    # Its activations are those of 8 bits in the format "affine", as for one weight.
    return experts_site(x, ids, slots, scales.shape[0], perm, signs, block, skip, down, down_scale, up, cells, 8, -1,
                        gate, activation, fused, apart)  # fmt: skip


def _gemv(
    words: Tensor, steps: Tensor, latent: Tensor | None, ids: Tensor, slots: int, scales: Tensor, codes: Tensor,
    down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None,
    step: int, columns: int, window: int, strip: int, x: Tensor,
) -> Tensor:  # fmt: skip
    from lopro_fx.kernels.formats.trellis.decode.device import choose_splits
    from lopro_fx.kernels.formats.trellis.experts.device import experts_product

    pairs, n = ids.shape[0], scales.shape[1]
    splits = choose_splits(pairs * n, steps.shape[2], columns, dispatch.processors(x.device))
    return experts_product(words, steps, latent, ids, slots, scales, codes, down_scale, up, up_scale, cells, core,
                           step, columns, window, strip, x.shape[1], splits, x.dtype)  # fmt: skip
