"""`lopro::packed_linear_device`: the Triton form of `lopro::packed_linear`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.formats.affine.linear.triton import matmul_kernel
from lopro_fx.kernels.tiles import NATIVE, WHOLE_ROW, main_width

# (tokens, features, warps, stages) by the most tokens that the shape is for; 0 for any number, on Hopper and later: the
# registers of an sm_80 don't hold that product and its operand.
_SHAPES = {16: (16, 64, 4, 4), 64: (64, 64, 4, 3), 0: (128, 64, 4, 3)}
# Columns of a step; they lie in one group if groups are at least as large.
_COLUMNS = 128


def launch(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, bits: int, group_size: int, tokens: int, splits: int,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Packed gemm with `tl.dot`.

    Args:
        x: (M, K) as by `fragments.ordered` for steps of `step_of` columns, contiguous.
        codes, scales, zeros, bias, up, up_scale, bits, group_size: as in `lopro::packed_linear`.
        latent: (parts, M, R), summed over its parts.
        tokens: tile shape to use: 16, 64, or 0 for any number; it decides speed, not the result.
        splits: parts of the columns, each with programs of its own, summed in fp32 in a fixed order.
        residual: (M, N), contiguous, added to the result before it is rounded.

    Returns:
        (M, N) of x's dtype.
    """
    (m, k), (n, weight_groups) = x.shape, scales.shape
    width = main_width(bits)
    block_m, block_n, warps, stages = _SHAPES[tokens]
    if x.dtype == torch.float32:
        block_m, block_n, warps, stages = min(block_m, 32), 64, 4, 2
    rank = 0 if up is None else up.shape[1]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    if latent is not None and tokens == 0 and latent.shape[0] > 1:
        # Otherwise each of many programs would read all parts of its tokens.
        latent = latent.sum(0, keepdim=True)
    y = x.new_empty((splits, m, n), dtype=x.dtype if splits == 1 else torch.float32)
    wrap_triton(matmul_kernel)[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n), splits)](
        x, codes, scales, zeros, codes if bias is None else bias, codes if latent is None else latent,
        codes if up is None else up, codes if up_scale is None else up_scale,
        codes if residual is None else residual, y, m,
        N=n, K=k, R=rank, PARTS=0 if latent is None else latent.shape[0], PART_ROWS=n // parts,
        WORDS=codes.shape[1] * width // bits, BITS=bits, WIDTH=width,
        GROUP=WHOLE_ROW if group_size == -1 else group_size, WEIGHT_GROUPS=weight_groups, SPLITS=splits,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=step_of(x.dtype, bits, group_size),
        BLOCK_R=max(16, triton.next_power_of_2(rank)), GROUP_M=8,
        HAS_BIAS=bias is not None, HAS_SCALES=up_scale is not None, HAS_RESIDUAL=residual is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", NATIVE=NATIVE, WARPS=warps, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return y.view(m, n) if splits == 1 else y.sum(0).to(x.dtype)


def step_of(dtype: torch.dtype, bits: int, group_size: int) -> int:
    """Columns of a step for activations of `dtype`: a thread loads at most four words of a row at a time."""
    return 64 if bits == 8 or group_size == 64 or dtype == torch.float32 else _COLUMNS


def tile_for(
    tokens: int | torch.SymInt, rows: int, columns: int, processors: int, capability: tuple[int, int]
) -> tuple[int, int]:
    """Tile shape and parts of the columns for a number of tokens, on a device of `capability`."""
    for shape, (_, block_n, _, _) in _SHAPES.items():
        if shape and dispatch.at_most(tokens, shape):
            programs, splits = triton.cdiv(rows, block_n), 1
            while programs * splits < 2 * processors and columns >= 4 * splits * 2 * _COLUMNS:
                splits *= 2
            return shape, splits
    return 0 if capability >= (9, 0) else 64, 1


# `launch` stays callable as it is, so that launches can be recorded without a device.
packed_linear_device = registry.register_triton("packed_linear_device", launch)
