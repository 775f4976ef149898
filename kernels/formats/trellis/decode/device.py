"""`lopro::trellis_product`: the gemv of one token, after `lopro::decode_prepare` of the format "affine"."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from lopro_fx.kernels import registry
from lopro_fx.kernels.formats.affine.decode.device import decode_prepare
from lopro_fx.kernels.formats.trellis.code import strip_rows
from lopro_fx.kernels.formats.trellis.decode.triton import BLOCK_N, product_kernel
from lopro_fx.kernels.tiles import NATIVE

# Groups of a program, each with a warp of its own.
_GROUPS = 4
# States that a thread loads before it waits for any.
_AHEAD = 16
# Programs of a multiprocessor that hide the latency of each other's loads, by columns of a state: a pair has less to
# compute on what it waits for.
_PROGRAMS = {1: 4, 2: 16}


def prepare(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, down: Tensor | None, norm: Tensor | None = None,
    eps: float = 0.0, gate: Tensor | None = None, activation: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`decode_prepare` of x (M, K) for `trellis_product`: as for codes of 8 bits, whose four bytes lie in order."""
    return decode_prepare(x, perm, signs, block, down, 8, -1, norm, eps, gate, activation)


def product(
    words: Tensor, steps: Tensor, latent: Tensor, scales: Tensor, codes: Tensor, bias: Tensor | None,
    down_scale: Tensor | None, up: Tensor | None, up_scale: Tensor | None, step: int, columns: int, window: int,
    strip: int, in_features: int, splits: int, dtype: torch.dtype, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gemv of a prepared activation and a trellis weight, plus low-rank branch, bias and residual.

    Args:
        words, steps: from `prepare`.
        latent: fp32 (parts, M, R), summed over its parts: from `prepare`, or A x' itself.
        scales, codes, step, columns, window, strip, in_features: as in `trellis_dequantize`.
        bias, up, up_scale: as in `definition.linear`.
        down_scale: fp16 (R,), or None where `latent` holds it already.
        splits: parts of the columns, each with programs of its own. They are summed afterwards, so the result doesn't
            depend on the order in which programs finish.
        dtype: of the result.
        residual: (M, N), contiguous, added to the result before it is rounded.

    Returns:
        (M, N) of `dtype`.
    """
    m, n, chunks = words.shape[0], scales.shape[0], latent.shape[0]
    strips = strip_rows(n, strip)
    rank = 0 if up is None else up.shape[1]
    parts = up_scale.shape[0] if up_scale is not None and up_scale.dim() == 2 else 1
    # Partial sums stay fp32; a single part is written in `dtype`.
    y = words.new_empty((splits, m, n), dtype=dtype if splits == 1 else torch.float32)
    wrap_triton(product_kernel)[(triton.cdiv(n, BLOCK_N), splits, m)](
        words, steps, latent, scales, codes, words if bias is None else bias,
        words if down_scale is None else down_scale, words, words if up is None else up,
        words if up_scale is None else up_scale, words if residual is None else residual, y, m,
        N=n, R=rank, PART_ROWS=n // parts, PAIRS=triton.cdiv(in_features, columns), WORDS=words.shape[3],
        GROUPS=steps.shape[2], STEP=step, COLUMNS=columns, WINDOW=window, STRIP=strips[0], STRIPS=len(strips),
        CHUNKS=chunks, SPLITS=splits, BLOCK_G=_GROUPS, UNROLL=_AHEAD * columns // 4,
        BLOCK_R=triton.next_power_of_2(max(rank, 1)), BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        HAS_BIAS=bias is not None, HAS_DOWN_SCALE=down_scale is not None, HAS_CORE=False,
        HAS_UP_SCALE=up_scale is not None, HAS_RESIDUAL=residual is not None, NATIVE=NATIVE, num_warps=_GROUPS,
    )  # fmt: skip
    return y.view(m, n) if splits == 1 else y.sum(0).to(dtype)


# The function above stays callable as it is, so that launches can be recorded without a device.
trellis_product = registry.register_triton("trellis_product", product)


def choose_splits(rows: int, groups: int, columns: int, processors: int) -> int:
    """Parts of the columns: as many as fill the multiprocessors, with at least one group for each warp."""
    programs, splits = triton.cdiv(rows, BLOCK_N), 1
    while programs * splits < _PROGRAMS[columns] * processors and groups >= 2 * splits * _GROUPS:
        splits *= 2
    return splits
