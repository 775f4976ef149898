"""`lopro::packed_linear` by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.project.reference import dense_factor


def packed_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, bits: int, group_size: int,
) -> Tensor:  # fmt: skip
    """`definition.linear` by the Triton kernels for the number of tokens."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if latent is not None:
        latent = latent.reshape(1, -1, latent.shape[-1]).contiguous()
    y = product(rows, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size)
    return y.view(*x.shape[:-1], y.shape[-1])


def product(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, bits: int, group_size: int, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`packed_linear` of x (M, K), contiguous, and latent (parts, M, R), summed over its parts, by gemv or gemm.

    `residual` (M, N), contiguous, is added to the result.
    """
    from lopro_fx.kernels.formats.affine.decode.device import choose_splits, decode_prepare, decode_product
    from lopro_fx.kernels.formats.affine.packing.device import dequantize_device

    (m, k), n = x.shape, scales.shape[0]
    count = dispatch.processors(x.device)
    if dispatch.at_most(m, dispatch.DECODE_TOKENS):
        words, steps, empty = decode_prepare(x, None, None, 1, None, bits, group_size)
        parts = empty if latent is None else latent.to(torch.float32)
        splits = choose_splits(n, words.shape[-1], count)
        return decode_product(
            words, steps, parts, codes, scales, zeros, bias, None, up, up_scale, bits, group_size, splits, x.dtype,
            residual,
        )  # fmt: skip
    if dispatch.at_most(m, dispatch.DENSE_TOKENS):
        from lopro_fx.kernels.formats.affine.linear.device import step_of
        from lopro_fx.kernels.fragments import ordered
        from lopro_fx.kernels.tiles import main_width

        x = ordered(x, main_width(bits), step_of(x.dtype, bits, group_size))
        return few(x, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size, residual)
    weight = dequantize_device(codes, scales, zeros, bits, group_size, k, x.dtype)
    y = torch.nn.functional.linear(x, weight, bias)
    if latent is not None and up is not None:
        latent = (latent.squeeze(0) if latent.shape[0] == 1 else latent.sum(0)).to(x.dtype)
        y = y + torch.nn.functional.linear(latent, dense_factor(up, up_scale, 1).to(x.dtype))
    return y if residual is None else y + residual


def few(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, bits: int, group_size: int, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`product` for more than one token and at most `DENSE_TOKENS`, of x as `packed_linear_device` takes it."""
    from lopro_fx.kernels.formats.affine.linear.device import packed_linear_device, tile_for

    device = (dispatch.processors(x.device), dispatch.capability(x.device))
    tokens, splits = tile_for(x.shape[0], scales.shape[0], x.shape[1], *device)
    return packed_linear_device(
        x, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size, tokens, splits, residual
    )
