"""Registration of `lopro::packed_int8`."""

from __future__ import annotations

import torch
from torch import Tensor

from lopro_fx.kernels import dispatch, registry
from lopro_fx.kernels.formats.affine.packed_int8 import reference
from lopro_fx.kernels.rotate.op import rotate


def packed_int8(
    x: Tensor, perm: Tensor | None, signs: Tensor | None, block: int, skip: int, codes: Tensor, scales: Tensor,
    zeros: Tensor, bias: Tensor | None, latent: Tensor | None, up: Tensor | None, up_scale: Tensor | None, bits: int,
    group_size: int, act_bits: int, act_group: int,
) -> Tensor:  # fmt: skip
    """`reference.packed_int8`, in Triton where it serves."""
    if not dispatch.runs_triton(x):
        return reference.packed_int8(
            x, perm, signs, block, skip, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size, act_bits,
            act_group,
        )  # fmt: skip
    from lopro_fx.kernels.formats.affine.packed_int8.device import columns, int8_matmul_device, round_device, tile_for

    if skip:
        # Unrotated columns shift the Hadamard blocks against the groups, so the rotation has a launch of its own.
        x, perm, signs, block = rotate(x, perm, signs, block, skip), None, None, 1
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if latent is not None:
        latent = latent.reshape(-1, latent.shape[-1]).to(x.dtype).contiguous()
    size = columns(group_size, act_group)
    integers, steps, sums = round_device(rows, perm, signs, block, act_bits, act_group, size)
    if bits <= 4 and not dispatch.at_most(rows.shape[0], dispatch.DENSE_TOKENS):
        from lopro_fx.kernels.formats.affine.dense_int8.device import choose_halves, dense_int8_device
        from lopro_fx.kernels.formats.affine.packing.device import dequantize_device

        weight = dequantize_device(codes, scales, zeros, bits, group_size, rows.shape[1], torch.int8)
        y = dense_int8_device(
            integers, steps, weight, scales, bias, latent, up, up_scale, group_size, act_group, x.dtype,
            choose_halves(x.device, group_size, act_group, x.dtype),
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])
    y = int8_matmul_device(
        integers, steps, sums, codes, scales, zeros, bias, latent, up, up_scale, bits, group_size, act_group,
        tile_for(rows.shape[0]), x.dtype,
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


registry.register(
    "packed_int8(Tensor x, Tensor? perm, Tensor? signs, int block, int skip, Tensor codes, Tensor scales, "
    "Tensor zeros, Tensor? bias, Tensor? latent, Tensor? up, Tensor? up_scale, int bits, int group_size, int act_bits, "
    "int act_group) -> Tensor",
    packed_int8,
)
