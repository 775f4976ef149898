"""The definition of `lopro::packed_embedding`, plain ATen: rows of a packed table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lopro_fx.kernels.packing.format import scaled, unpack, unpack_at


def packed_embedding(
    ids: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Look up rows of `packing.format.dequantize(codes, ...)`, of which no other row is unpacked.

    Args:
        ids: int64 or int32, any shape, each in [0, rows).
        codes, scales, zeros: the packed table, see `kernels/packing/format.py`.
        bits: 2, 3, 4 or 8.
        group_size: columns per scale; -1 is the whole row.
        in_features: columns of the table.
        dtype: of the result; the arithmetic is fp32.

    Returns:
        (*ids.shape, in_features) of `dtype`.
    """
    groups = scales.shape[1]
    places = ids.unsqueeze(-1) * groups + torch.arange(groups, device=ids.device, dtype=torch.int64)
    rows = unpack(embedding(ids, codes), bits, in_features)
    return scaled(rows, embedding(ids, scales), unpack_at(zeros, bits, places), group_size, dtype)
