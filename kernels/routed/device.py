"""What the Triton launches of experts of every format share; nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import registry
from lopro_fx.kernels.routed.triton import own_kernel

# Rows of a core that a program multiplies.
_ROWS = 32


def latents(
    latent: Tensor, ids: Tensor, slots: int, rank: int, experts: int, cells: Tensor | None, core: Tensor | None
) -> Tensor:
    """Latents of each pair, those of its expert's row times its core.

    Args:
        latent: (tokens, rows * rank), contiguous.
        ids: int64 or int32 (tokens * slots,).
        rank: of a branch, at least 1.
        slots, cells, core: as in `definition.experts`.

    Returns:
        fp32 (1, tokens * slots, rank).
    """
    own = latent.new_empty((1, ids.shape[0], rank), dtype=torch.float32)
    block_r = triton.next_power_of_2(rank)
    block_o = min(block_r, _ROWS) if core is not None else block_r
    wrap_triton(own_kernel)[(ids.shape[0], triton.cdiv(rank, block_o))](
        latent, ids, ids if cells is None else cells, latent if core is None else core, own,
        SLOTS=slots, EXPERTS=experts, WIDTH=latent.shape[1], R=rank, BLOCK_R=block_r, BLOCK_O=block_o,
        HAS_CELLS=cells is not None, HAS_CORE=core is not None, num_warps=4 if core is not None else 1,
    )  # fmt: skip
    return own


def branch_of(latent: Tensor | None, up: Tensor | None) -> tuple[int, int, int]:
    """Rank, parts, and columns of a token's row (0 with parts, each of pairs) of latents that a gemv reads."""
    if latent is None or up is None:
        return 0, 1, 0
    return (up.shape[2], latent.shape[0], 0) if latent.dim() == 3 else (up.shape[2], 1, latent.shape[1])


def sorted_pairs(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, int64 (pairs,), and where each expert's begin in it, int32 (experts + 1,).

    The last begin those whose id is none of an expert.
    """
    # Without their signs, negative ids come last too.
    ranked, order = (ids & torch.iinfo(ids.dtype).max).sort()
    first = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(ranked, first, out_int32=True)


def most_tiles(pairs: int | torch.SymInt, experts: int, block: int) -> int | torch.SymInt:
    """Most tiles of at most `block` pairs of one expert each, that they can make; of a free number, some more."""
    tiles = -(-pairs // block) + experts
    return min(pairs, tiles) if isinstance(pairs, int) else tiles


# `latents` stays callable as it is, so that launches can be recorded without a device.
own_latents = registry.register_triton("experts_latents", latents)
