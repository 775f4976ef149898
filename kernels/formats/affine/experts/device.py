"""Launches of `lopro::packed_experts` and `lopro::packed_experts_site`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.formats.affine.decode.device import activation_group
from lopro_fx.kernels.formats.affine.experts.triton import (
    experts_matmul_kernel,
    experts_prepare_kernel,
    experts_product_kernel,
)
from lopro_fx.kernels.formats.affine.linear.device import step_of
from lopro_fx.kernels.formats.affine.packing.format import WORD, group_count
from lopro_fx.kernels.routed.device import branch_of, most_tiles
from lopro_fx.kernels.tiles import NATIVE, WHOLE_ROW, main_width

# Steps in flight, and warps, of the decode product: as for one weight.
_STAGES, _WARPS = 3, 4
# (pairs, features, warps, stages) by the most pairs of an average expert, 0 for any number, on Hopper and later, as for
# one weight.
_SHAPES = {16: (16, 64, 4, 4), 64: (64, 64, 4, 3), 0: (128, 64, 4, 3)}


def prepare(
    x: Tensor, ids: Tensor, slots: int, experts: int, perm: Tensor | None, signs: Tensor | None, block: int,
    down: Tensor, cells: Tensor | None, rank: int, bits: int, group_size: int, gate: Tensor | None, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`decode_prepare`, with the down-projection of each pair by the factor of its expert's row.

    Args:
        x, perm, signs, block, bits, group_size, gate, activation: as in `decode_prepare`, x (tokens, K).
        ids, slots, cells: as in `lopro::packed_experts`.
        experts: number of experts.
        down: int8 or fp16 (rows * rank, K); its scale is applied by `product`.
        rank: of a branch.

    Returns:
        words and steps of each token, as `decode_prepare` does.
        latent fp32 (chunks, pairs, rank): partial sums of A x'.
    """
    (tokens, k), pairs, width, group = x.shape, ids.shape[0], main_width(bits), activation_group(group_size)
    chunk, groups = max(block, group, activation_group(-1)), group_count(k, group)
    words, fields, chunks = -(-k // WORD) * width, 8 // width, -(-k // chunk)
    out = x.new_empty((tokens, 2, fields, words), dtype=torch.int32)
    steps = x.new_empty((tokens, 2, groups), dtype=torch.float32)
    latent = x.new_empty((chunks, pairs, rank), dtype=torch.float32)
    wrap_triton(experts_prepare_kernel)[(pairs, chunks)](
        x, down if gate is None else gate, down if perm is None else perm, down if signs is None else signs, down, ids,
        ids if cells is None else cells, out, steps, latent, pairs,
        EXPERTS=experts, SLOTS=slots, K=k, R=rank, WORDS=words, FIELDS=fields, GROUP=group, GROUPS=groups, CHUNK=chunk,
        LOG_BLOCK=block.bit_length() - 1, BLOCK_R=triton.next_power_of_2(rank), X_ROW=x.stride(0),
        GATE_ROW=0 if gate is None else gate.stride(0), ACTIVATION="" if gate is None else activation,
        HAS_CELLS=cells is not None, HAS_PERM=perm is not None, HAS_SIGNS=signs is not None,
    )  # fmt: skip
    return out, steps, latent


def product(
    words: Tensor, steps: Tensor, latent: Tensor | None, ids: Tensor, slots: int, codes: Tensor, scales: Tensor,
    zeros: Tensor, down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None,
    core: Tensor | None, bits: int, group_size: int, splits: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gemv of each pair, reading the packed rows of its expert.

    Args:
        words, steps: of all tokens, from `prepare` or `decode_prepare`.
        latent: (parts, pairs, rank) from `prepare`, or (tokens, rows * rank) as `lopro::packed_experts` takes it, with
            `up`; or None.
        down_scale: fp16 (rows * rank,), or None where `latent` holds it already.
        ids, slots, codes, scales, zeros, up, up_scale, cells, core, bits, group_size: as in `lopro::packed_experts`.
        splits: parts of the columns, as in `decode_product`.
        dtype: of the result.

    Returns:
        (pairs, N) of `dtype`.
    """
    (experts, n, weight_groups), pairs, width = scales.shape, ids.shape[0], main_width(bits)
    fields, count = words.shape[2:]
    rank, chunks, row = branch_of(latent, up)
    group_words = activation_group(group_size) * width // WORD
    # 512 bytes of a row in a step, half with a second plane.
    block_w = max(min(64 if bits == 3 else 128, triton.next_power_of_2(count)), group_words)
    block_n = 32 if triton.cdiv(n, 32) * pairs >= 2 * dispatch.processors(words.device) else 16
    y = words.new_empty((splits, pairs, n), dtype=dtype if splits == 1 else torch.float32)
    wrap_triton(experts_product_kernel)[(triton.cdiv(n, block_n), splits, pairs)](
        words, steps, steps if latent is None else latent, codes, scales, zeros,
        words if down_scale is None else down_scale, words if core is None else core, words if up is None else up,
        words if up_scale is None else up_scale, ids, words if cells is None else cells, y, pairs,
        EXPERTS=experts, SLOTS=slots, ZEROS=zeros.shape[1], N=n, R=rank, LATENT=row, WORDS=count, FIELDS=fields,
        BITS=bits, WIDTH=width, WORDS_IN_GROUP=group_words, GROUPS=steps.shape[2], WEIGHT_GROUPS=weight_groups,
        CHUNKS=chunks, SPLITS=splits, BLOCK_N=block_n, BLOCK_W=block_w, BLOCK_R=triton.next_power_of_2(max(rank, 1)),
        BLOCK_CHUNKS=triton.next_power_of_2(chunks), HAS_CELLS=cells is not None,
        HAS_DOWN_SCALE=down_scale is not None, HAS_CORE=core is not None, HAS_UP_SCALE=up_scale is not None,
        STAGES=_STAGES, NATIVE=NATIVE, num_warps=_WARPS,
    )  # fmt: skip
    return y.view(pairs, n) if splits == 1 else y.sum(0).to(dtype)


def matmul(
    x: Tensor, own: Tensor | None, order: Tensor, starts: Tensor, slots: int, codes: Tensor, scales: Tensor,
    zeros: Tensor, up: Tensor | None, up_scale: Tensor | None, cells: Tensor | None, bits: int, group_size: int,
    tile: int,
) -> Tensor:  # fmt: skip
    """Packed gemm of tiles of pairs of one expert each.

    Args:
        x: (tokens, K) as by `fragments.ordered` for steps of `step_of` columns, contiguous.
        own: from `own_latents`, with `up`; or None.
        order, starts: from `sorted_pairs`.
        slots, codes, scales, zeros, up, up_scale, cells, bits, group_size: as in `lopro::packed_experts`.
        tile: tile shape to use, from `choose_tile`; it decides speed, not the result.

    Returns:
        (pairs, N) of x's dtype.
    """
    (experts, n, weight_groups), pairs, width = scales.shape, order.shape[0], main_width(bits)
    block_m, block_n, warps, stages = _SHAPES[tile]
    if x.dtype == torch.float32:
        block_m, stages = min(block_m, 32), 2
    rank = 0 if own is None else own.shape[2]
    y = x.new_empty((pairs, n))
    wrap_triton(experts_matmul_kernel)[(triton.cdiv(n, block_n), 1, most_tiles(pairs, experts, block_m))](
        x, x if own is None else own, codes, scales, zeros, codes if up is None else up,
        codes if up_scale is None else up_scale, order, starts, starts if cells is None else cells, y, pairs,
        EXPERTS=experts, SLOTS=slots, ZEROS=zeros.shape[1], N=n, K=x.shape[1], R=rank, PARTS=0 if own is None else 1,
        WORDS=codes.shape[2] * width // bits, BITS=bits, WIDTH=width,
        GROUP=WHOLE_ROW if group_size == -1 else group_size, WEIGHT_GROUPS=weight_groups,
        BLOCK_E=triton.next_power_of_2(experts + 1), BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=step_of(x.dtype, bits, group_size), BLOCK_R=max(16, triton.next_power_of_2(rank)),
        HAS_CELLS=cells is not None, HAS_SCALES=up_scale is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", NATIVE=NATIVE, WARPS=warps, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return y


# The functions above stay callable as they are, so that launches can be recorded without a device.
experts_prepare = registry.register_triton("experts_prepare", prepare)
experts_product = registry.register_triton("packed_experts_product", product)
experts_matmul = registry.register_triton("packed_experts_matmul", matmul)
