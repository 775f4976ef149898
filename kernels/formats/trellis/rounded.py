"""Matrix rounded to the format "trellis", before it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lopro_fx.kernels.formats.packed import Packed
from lopro_fx.kernels.formats.quantizer import Rounded
from lopro_fx.kernels.formats.scales import stored_scales
from lopro_fx.kernels.formats.trellis.code import pack_states, strip_rows, table

# Least scale that fp16 holds to a part of 2^-8, for `stored_scales`.
_RANGE = 6


@dataclass(frozen=True)
class TrellisRounded(Rounded):
    """`states` int16 (m, ceil(n / columns)), read as unsigned, and `scales` fp32 (m,), of `width` = n columns."""

    states: Tensor
    scales: Tensor
    width: int
    bits: float
    columns: int
    window: int
    strip: int

    def levels(self) -> Tensor:
        """Values of the states, fp32 (m, n), without the scales."""
        states = self.states.to(torch.int32) & 0xFFFF
        return table(self.window, self.columns).to(states.device)[states].flatten(1)[:, : self.width]

    def dense(self) -> Tensor:
        return self.levels() * self.scales.unsqueeze(1)

    def times(self, units: Tensor) -> TrellisRounded:
        return replace(self, scales=self.scales * units.squeeze(1))

    def split(self, rows: Sequence[int]) -> list[TrellisRounded]:
        parts = zip(self.states.split(list(rows)), self.scales.split(list(rows)), strict=True)
        return [replace(self, states=states, scales=scales) for states, scales in parts]

    def packed(self) -> Packed:
        scales = stored_scales(self.scales.unsqueeze(1), _RANGE).squeeze(1).contiguous()
        codes = pack_states(self.states, round(self.bits * self.columns), self.strip)
        spec = {"bits": self.bits, "columns": self.columns, "window": self.window, "strip": self.strip}
        return Packed("trellis", (len(scales), self.width), spec, {"scales": scales, "codes": codes})


def strips_of(rows: Sequence[int], strip: int) -> list[int]:
    """Rows of each strip of layers under one another."""
    return [part for count in rows for part in strip_rows(count, strip)]
