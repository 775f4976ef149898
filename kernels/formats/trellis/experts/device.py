"""Launches of `lopro::trellis_experts` and `lopro::trellis_experts_site`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import registry
from lopro_fx.kernels.formats.trellis.code import strip_rows
from lopro_fx.kernels.formats.trellis.decode.triton import BLOCK_N
from lopro_fx.kernels.formats.trellis.experts.triton import experts_matmul_kernel, experts_product_kernel
from lopro_fx.kernels.routed.device import branch_of, most_tiles
from lopro_fx.kernels.tiles import NATIVE

# Groups of a program, each with a warp of its own, and states that a thread loads before it waits for any: as for one
# weight.
_GROUPS, _AHEAD = 4, 16
# (pairs, features, columns of a step, warps, stages) by the most pairs of an average expert; 0 for any number.
_SHAPES = {16: (16, 64, 64, 4, 3), 64: (64, 64, 64, 4, 3), 0: (128, 64, 64, 4, 3)}


def product(
    words: Tensor, steps: Tensor, latent: Tensor | None, ids: Tensor, slots: int, scales: Tensor, codes: Tensor,
    down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None, core: Tensor | None,
    step: int, columns: int, window: int, strip: int, in_features: int, splits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gemv of each pair, reading the strings of its expert.

    Args:
        words, steps: of all tokens, from `experts_prepare` or `decode.device.prepare`.
        latent, down_scale: as in the product of the format "affine".
        ids, slots, scales, codes, up, up_scale, cells, core, columns, window, strip: as in `lopro::trellis_experts`.
        step: new bits of a step.
        in_features: columns of the weights.
        splits: parts of the columns, as in `trellis_product`.
        dtype: of the result.

    Returns:
        (pairs, N) of `dtype`.
    """
    (experts, n), pairs, strips = scales.shape, ids.shape[0], strip_rows(scales.shape[1], strip)
    rank, chunks, row = branch_of(latent, up)
    y = words.new_empty((splits, pairs, n), dtype=dtype if splits == 1 else torch.float32)
    wrap_triton(experts_product_kernel)[(triton.cdiv(n, BLOCK_N), splits, pairs)](
        words, steps, steps if latent is None else latent, scales, codes, words if down_scale is None else down_scale,
        words if core is None else core, words if up is None else up, words if up_scale is None else up_scale, ids,
        words if cells is None else cells, y, pairs,
        EXPERTS=experts, SLOTS=slots, CODES=codes.shape[1], N=n, R=rank, LATENT=row,
        PAIRS=triton.cdiv(in_features, columns), WORDS=words.shape[3], GROUPS=steps.shape[2], STEP=step,
        COLUMNS=columns, WINDOW=window, STRIP=strips[0], STRIPS=len(strips), CHUNKS=chunks, SPLITS=splits,
        BLOCK_G=_GROUPS, UNROLL=_AHEAD * columns // 4, BLOCK_N=BLOCK_N, BLOCK_R=triton.next_power_of_2(max(rank, 1)),
        BLOCK_CHUNKS=triton.next_power_of_2(chunks), HAS_CELLS=cells is not None,
        HAS_DOWN_SCALE=down_scale is not None, HAS_CORE=core is not None, HAS_UP_SCALE=up_scale is not None,
        NATIVE=NATIVE, num_warps=_GROUPS,
    )  # fmt: skip
    return y.view(pairs, n) if splits == 1 else y.sum(0).to(dtype)


def matmul(
    x: Tensor, own: Tensor | None, order: Tensor, starts: Tensor, slots: int, scales: Tensor, codes: Tensor,
    up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None, step: int, columns: int, window: int,
    strip: int, tile: int,
) -> Tensor:  # fmt: skip
    """Gemm of tiles of pairs of one expert each.

    Args:
        x: (tokens, in_features), contiguous.
        own: from `own_latents`, with `up`; or None.
        order, starts: from `sorted_pairs`.
        slots, scales, codes, up, up_scale, cells, columns, window, strip: as in `lopro::trellis_experts`.
        step: new bits of a step.
        tile: tile shape to use, from `choose_tile`; it decides speed, not the result.

    Returns:
        (pairs, N) of x's dtype.
    """
    (experts, n), pairs, strips = scales.shape, order.shape[0], strip_rows(scales.shape[1], strip)
    block_m, block_n, block_k, warps, stages = _SHAPES[tile]
    if x.dtype == torch.float32:
        block_m, block_k, stages = min(block_m, 32), 32, 2
    rank = 0 if own is None else own.shape[2]
    y = x.new_empty((pairs, n))
    wrap_triton(experts_matmul_kernel)[(triton.cdiv(n, block_n), 1, most_tiles(pairs, experts, block_m))](
        x, x if own is None else own, scales, codes, codes if up is None else up,
        codes if up_scale is None else up_scale, order, starts, starts if cells is None else cells, y, pairs,
        EXPERTS=experts, SLOTS=slots, CODES=codes.shape[1], N=n, K=x.shape[1], R=rank, PARTS=0 if own is None else 1,
        STEP=step, COLUMNS=columns, WINDOW=window, STRIP=strips[0], STRIPS=len(strips),
        BLOCK_E=triton.next_power_of_2(experts + 1), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_R=max(16, triton.next_power_of_2(rank)), HAS_CELLS=cells is not None, HAS_SCALES=up_scale is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", NATIVE=NATIVE, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


# The functions above stay callable as they are, so that launches can be recorded without a device.
experts_product = registry.register_triton("trellis_experts_product", product)
experts_matmul = registry.register_triton("trellis_experts_matmul", matmul)
