"""`lopro::trellis_site` by Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.site.op import contiguous_rows
from lopro_fx.kernels.formats.trellis.linear.op import one_by_one, product
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.prologue.reference import prologue


def trellis_site(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, scales: Tensor, codes: Tensor, bias: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: float, columns: int, window: int, strip: int, norm: Tensor | None = None,
    eps: float = 0.0, gate: Tensor | None = None, activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`definition.site`: two launches a token for a few, else rotation, dequantisation and a gemm of ATen."""
    shape, step = (*x.shape[:-1], scales.shape[0]), round(bits * columns)
    rows = contiguous_rows(x)
    gate, residual = (None if value is None else contiguous_rows(value) for value in (gate, residual))
    if one_by_one(rows.shape[0]):
        gates, added = ([None] * len(rows) if value is None else value.split(1) for value in (gate, residual))
        inner = (perm, signs, block, skip, down, down_scale, scales, codes, bias, up, up_scale)
        spec = (bits, columns, window, strip)
        return torch.cat([trellis_site(row, *inner, *spec, norm, eps, own, activation, more)
                          for row, own, more in zip(rows.split(1), gates, added, strict=True)]).view(shape)  # fmt: skip
    one = dispatch.at_most(rows.shape[0], dispatch.DECODE_TOKENS)
    # Unrotated columns shift the Hadamard blocks against the groups: the rotation then has a launch of its own.
    decodes, rotates = one and not skip, perm is not None or block > 1
    fused = decodes or (rotates and (norm is None or dispatch.at_most(rows.shape[0], dispatch.NORM_TOKENS)))
    if not fused or (norm is not None and gate is not None):
        rows, perm = prologue(rows, perm, norm, eps, gate, activation)
        norm, gate, rotates = None, None, perm is not None or block > 1
    before = (norm, eps, gate, activation)
    if residual is not None:
        residual = residual.contiguous()
    if decodes:
        from lopro_fx.kernels.formats.trellis.decode.device import choose_splits, prepare, trellis_product

        words, steps, latent = prepare(rows, perm, signs, block, down, *before)
        splits = choose_splits(scales.shape[0], steps.shape[2], columns, dispatch.processors(x.device))
        y = trellis_product(
            words, steps, latent, scales, codes, bias, down_scale, up, up_scale, step, columns, window, strip,
            rows.shape[1], splits, x.dtype, residual,
        )  # fmt: skip
        return y.view(shape)
    if rotates:
        from lopro_fx.kernels.rotate.device import rotate_device

        rows = rotate_device(rows, perm, signs, block, skip, *before)
    if one:
        latent = None if down is None else project(rows, down, down_scale).unsqueeze(0)
        rest = (bits, columns, window, strip, residual)
        return product(rows.contiguous(), scales, codes, bias, latent, up, up_scale, *rest).view(shape)
    from lopro_fx.kernels.formats.trellis.packing.device import trellis_dequantize

    branch = (up, up_scale, down, down_scale)
    weight = trellis_dequantize(scales, codes, step, columns, window, strip, rows.shape[1], rows.dtype, *branch)
    y = functional.linear(rows, weight, bias)
    return (y if residual is None else y + residual).view(shape)
