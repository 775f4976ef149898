"""Matrix rounded to the format "affine", before it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET, pack
from lopro_fx.kernels.formats.packed import Packed
from lopro_fx.kernels.formats.quantizer import Rounded
from lopro_fx.kernels.formats.scales import stored_scales

# Packing takes many times the codes' memory; all rows of an output projection (the vocabulary) at once would fill it.
_ROWS = 8192


@dataclass(frozen=True)
class AffineRounded(Rounded):
    """`codes` uint8 (m, n), `scales` fp32 (m, groups), `zeros` uint8 codes (m, groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    def dense(self) -> Tensor:
        n = self.codes.shape[1]
        size = n if self.group_size == -1 else self.group_size
        group = torch.arange(n, dtype=torch.int64, device=self.codes.device) // size
        zero = self.zeros.to(torch.float32) + ZERO_OFFSET
        return (self.codes.to(torch.float32) - zero[:, group]) * self.scales[:, group]

    def times(self, units: Tensor) -> AffineRounded:
        return replace(self, scales=self.scales * units)

    def split(self, rows: Sequence[int]) -> list[AffineRounded]:
        sizes = list(rows)
        parts = zip(self.codes.split(sizes), self.scales.split(sizes), self.zeros.split(sizes), strict=True)
        return [replace(self, codes=codes, scales=scales, zeros=zeros) for codes, scales, zeros in parts]

    def packed(self) -> Packed:
        codes = torch.cat([pack(part, self.bits) for part in self.codes.split(_ROWS)])
        scales, zeros = stored_scales(self.scales, self.bits).contiguous(), pack(self.zeros.flatten(), self.bits)
        return affine(codes, scales, zeros, self.bits, self.group_size, self.codes.shape[1])


def affine(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, in_features: int) -> Packed:
    """Packed weight in this format, from tensors as in `packing/format.py`."""
    spec = {"bits": bits, "group_size": group_size}
    return Packed("affine", (scales.shape[0], in_features), spec, {"codes": codes, "scales": scales, "zeros": zeros})
