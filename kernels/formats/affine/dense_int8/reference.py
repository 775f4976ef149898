"""The definition of `lopro::dense_int8_device`, plain ATen, and of the weight that it takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET, unpack
from lopro_fx.kernels.project.reference import dense_factor


def doubled(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int) -> Tensor:
    """2 (code - zero point), int8 (out_features, in_features): whole numbers, zero points lying half-way between codes.

    Args:
        codes, scales, zeros, group_size, in_features: as in `packing.format.dequantize`.
        bits: at most 4: results of 8 would not fit int8.
    """
    n, groups = scales.shape
    size = in_features if group_size == -1 else group_size
    zero = unpack(zeros, bits, n * groups).view(n, groups) + ZERO_OFFSET
    return (2 * (unpack(codes, bits, in_features) - _by_column(zero, size, in_features))).to(torch.int8)


def dense_int8(
    x: Tensor, steps: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, latent: Tensor | None,
    up: Tensor | None, up_scale: Tensor | None, group_size: int, act_group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gemm of rounded activations and a doubled weight, plus low-rank branch and bias, computed in fp32.

    Args:
        x: int8 (M, K).
        steps: fp32 (act_groups, M), as `packed_int8.device.round_rows` returns them.
        weight: int8 (N, K), from `doubled`.
        scales, bias, up, up_scale, group_size: as in `lopro::packed_linear`.
        latent: (M, R) of `dtype`, or None.
        act_group: columns that share a step, or -1.
        dtype: of the result.

    Returns:
        (M, N) of `dtype`.
    """
    k = x.shape[1]
    wide = x.to(torch.float32) * _by_column(steps.T, k if act_group == -1 else act_group, k)
    scale = _by_column(scales.to(torch.float32), k if group_size == -1 else group_size, k)
    y = functional.linear(wide, weight.to(torch.float32) * scale / 2, None if bias is None else bias.to(torch.float32))
    if latent is not None and up is not None:
        y = y + functional.linear(latent.to(torch.float32), dense_factor(up, up_scale, 1))
    return y.to(dtype)


def _by_column(values: Tensor, size: int, columns: int) -> Tensor:
    """(rows, groups) repeated to (rows, columns)."""
    return values.repeat_interleave(size, 1)[:, :columns]
