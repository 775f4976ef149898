"""Matrix rounded to the format "affine", before it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.format import affine
from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET, pack
from lopro_fx.kernels.formats.base import Packed
from lopro_fx.methods.units import stored_scales

# Packing takes many times the codes' memory; all rows of an output projection (the vocabulary) at once would fill it.
_ROWS = 8192


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 (m, n), `scales` fp32 (m, groups), `zeros` uint8 codes (m, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    def dense(self) -> Tensor:
        """Dequantise to fp32 (m, n)."""
        n = self.codes.shape[1]
        size = n if self.group_size == -1 else self.group_size
        group = torch.arange(n, dtype=torch.int64, device=self.codes.device) // size
        zero = self.zeros.to(torch.float32) + ZERO_OFFSET
        return (self.codes.to(torch.float32) - zero[:, group]) * self.scales[:, group]

    def split(self, rows: Sequence[int]) -> list[Rounded]:
        """Split into parts of these numbers of rows."""
        sizes = list(rows)
        parts = zip(self.codes.split(sizes), self.scales.split(sizes), self.zeros.split(sizes), strict=True)
        return [Rounded(codes, scales, zeros, self.group_size) for codes, scales, zeros in parts]

    def packed(self, bits: int) -> Packed:
        """Pack the weight, with codes of `bits` bits."""
        codes = torch.cat([pack(part, bits) for part in self.codes.split(_ROWS)])
        scales, zeros = stored_scales(self.scales, bits).contiguous(), pack(self.zeros.flatten(), bits)
        return affine(codes, scales, zeros, bits, self.group_size, self.codes.shape[1])
