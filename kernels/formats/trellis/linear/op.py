"""`lopro::trellis_linear` by Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.project.reference import dense_factor

# Writing the weight out takes as long as four to six tokens by themselves (H100, 28672x8192).
_ONE_BY_ONE = 4


def one_by_one(tokens: int | torch.SymInt) -> bool:
    """Whether tokens, more than one, are multiplied one after the other."""
    return isinstance(tokens, int) and dispatch.DECODE_TOKENS < tokens <= _ONE_BY_ONE


def trellis_linear(
    x: Tensor, scales: Tensor, codes: Tensor, bias: Tensor | None, latent: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: float, columns: int, window: int, strip: int,
) -> Tensor:  # fmt: skip
    """`definition.linear` by the Triton kernels for the number of tokens."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if latent is not None:
        latent = latent.reshape(1, -1, latent.shape[-1]).contiguous()
    y = product(rows, scales, codes, bias, latent, up, up_scale, bits, columns, window, strip)
    return y.view(*x.shape[:-1], y.shape[-1])


def product(
    x: Tensor, scales: Tensor, codes: Tensor, bias: Tensor | None, latent: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: float, columns: int, window: int, strip: int, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`trellis_linear` of x (M, K), contiguous, and latent (parts, M, R), summed over its parts, by gemv or gemm.

    `residual` (M, N), contiguous, is added to the result.
    """
    from lopro_fx.kernels.formats.trellis.decode.device import choose_splits, prepare, trellis_product
    from lopro_fx.kernels.formats.trellis.packing.device import trellis_dequantize

    (m, k), step = x.shape, round(bits * columns)
    if one_by_one(m):
        lows = [None] * m if latent is None else [part.contiguous() for part in latent.split(1, 1)]
        added = [None] * m if residual is None else residual.split(1)
        rest = (up, up_scale, bits, columns, window, strip)
        return torch.cat([product(row, scales, codes, bias, low, *rest, more)
                          for row, low, more in zip(x.split(1), lows, added, strict=True)])  # fmt: skip
    if dispatch.at_most(m, dispatch.DECODE_TOKENS):
        words, steps, empty = prepare(x, None, None, 1, None)
        parts = empty if latent is None else latent.to(torch.float32)
        splits = choose_splits(scales.shape[0], steps.shape[2], columns, dispatch.processors(x.device))
        return trellis_product(
            words, steps, parts, scales, codes, bias, None, up, up_scale, step, columns, window, strip, k, splits,
            x.dtype, residual,
        )  # fmt: skip
    weight = trellis_dequantize(scales, codes, step, columns, window, strip, k, x.dtype)
    y = functional.linear(x, weight, bias)
    if latent is not None and up is not None:
        latent = (latent.squeeze(0) if latent.shape[0] == 1 else latent.sum(0)).to(x.dtype)
        y = y + functional.linear(latent, dense_factor(up, up_scale, 1).to(x.dtype))
    return y if residual is None else y + residual
