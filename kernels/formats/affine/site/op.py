"""`lopro::packed_site` by Triton."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from lopro_fx.kernels import dispatch
from lopro_fx.kernels.formats.affine.linear.op import few, product
from lopro_fx.kernels.project.reference import project
from lopro_fx.kernels.prologue.reference import prologue


def packed_site(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, down: Tensor | None,
    down_scale: Tensor | None, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, up: Tensor | None,
    up_scale: Tensor | None, bits: int, group_size: int, norm: Tensor | None = None, eps: float = 0.0,
    gate: Tensor | None = None, activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`definition.site`: two launches, three with partial sums or dense weights, more for a prologue kept apart."""
    shape = (*x.shape[:-1], scales.shape[0])
    rows = contiguous_rows(x)
    gate, residual = (None if value is None else contiguous_rows(value) for value in (gate, residual))
    # Unrotated columns shift the Hadamard blocks against the groups: the rotation then has a launch of its own.
    decodes = dispatch.at_most(rows.shape[0], dispatch.DECODE_TOKENS) and not skip
    rotates = perm is not None or block > 1
    fused = decodes or (rotates and (norm is None or dispatch.at_most(rows.shape[0], dispatch.NORM_TOKENS)))
    if not fused or (norm is not None and gate is not None):
        rows, perm = prologue(rows, perm, norm, eps, gate, activation)
        norm, gate, rotates = None, None, perm is not None or block > 1
    before = (norm, eps, gate, activation)
    if residual is not None:
        residual = residual.contiguous()
    if decodes:
        from lopro_fx.kernels.formats.affine.decode.device import choose_splits, decode_prepare, decode_product

        words, steps, latent = decode_prepare(rows, perm, signs, block, down, bits, group_size, *before)
        splits = choose_splits(scales.shape[0], words.shape[-1], dispatch.processors(x.device))
        y = decode_product(
            words, steps, latent, codes, scales, zeros, bias, down_scale, up, up_scale, bits, group_size, splits,
            x.dtype, residual,
        )  # fmt: skip
        return y.view(shape)
    if not dispatch.at_most(rows.shape[0], dispatch.DENSE_TOKENS):
        from lopro_fx.kernels.formats.affine.packing.device import dequantize_device

        if rotates:
            from lopro_fx.kernels.rotate.device import rotate_device

            rows = rotate_device(rows, perm, signs, block, skip, *before)
        branch = (up, up_scale, down, down_scale)
        weight = dequantize_device(codes, scales, zeros, bits, group_size, rows.shape[1], rows.dtype, *branch)
        y = functional.linear(rows, weight, bias)
        return (y if residual is None else y + residual).view(shape)
    latent, in_order = None, False
    if rotates:
        from lopro_fx.kernels.formats.affine.linear.device import step_of
        from lopro_fx.kernels.rotate.device import chunk_for, rotate_device, rotate_project
        from lopro_fx.kernels.tiles import main_width

        step = step_of(rows.dtype, bits, group_size)
        in_order = not dispatch.at_most(rows.shape[0], dispatch.DECODE_TOKENS) and skip % step == 0
        order = (main_width(bits), step) if in_order else (0, 0)
        if down is None:
            rows = rotate_device(rows, perm, signs, block, skip, *before, *order)
        else:
            chunk = chunk_for(rows.shape[0], rows.shape[1], block)
            rows, latent = rotate_project(rows, perm, signs, block, skip, down, down_scale, chunk, *before, *order)
    elif down is not None:
        latent = project(rows, down, down_scale).unsqueeze(0)
    multiply = few if in_order else product
    y = multiply(rows.contiguous(), codes, scales, zeros, bias, latent, up, up_scale, bits, group_size, residual)
    return y.view(shape)


def contiguous_rows(x: Tensor) -> Tensor:
    """x as (tokens, columns) with contiguous columns: a view where x allows one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and isinstance(rows.stride(0), int) else rows.contiguous()
