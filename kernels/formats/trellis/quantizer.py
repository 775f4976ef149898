"""Rounding to the format "trellis": each column of a strip by one search, with exact feedback between columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.kernels.formats.quantizer import Quantizer, Rounded, Rounder, blocks
from lopro_fx.kernels.formats.scales import fit_row_scales, rounded_scale
from lopro_fx.kernels.formats.trellis.code import table
from lopro_fx.kernels.formats.trellis.encode.choice import search
from lopro_fx.kernels.formats.trellis.rounded import TrellisRounded, strips_of

# Columns whose feedback is applied one at a time before a GEMM updates the rest.
_BLOCK = 64
# Columns of a step. A pair halves the work of reading, but at 2 bits it has 1.1 times the loss of single columns.
_COLUMNS = {1.5: 2, 2: 1, 2.5: 2, 3: 1, 4: 1}
# Deviation of the code over that of a row.
_SPREAD = {1.5: 1.03, 2: 1.04, 2.5: 1.06, 3: 1.1, 4: 1.18}


@dataclass(frozen=True, kw_only=True)
class TrellisQuantizer(Quantizer):
    """A bit string a column and a scale a row.

    Args:
        bits: of a weight.
        window: bits of a state.
        strip: rows of a string; -1 for all.
    """

    bits: float = 3
    window: int = 14
    strip: int = 512
    allowed: ClassVar[Mapping[str, Sequence[Any]]] = {
        "bits": tuple(_COLUMNS),
        "window": tuple(range(12, 17)),
        "strip": (-1, *range(32, 4097, 32)),
    }

    @property
    def columns(self) -> int:
        return _COLUMNS[self.bits]

    @property
    def most_bits(self) -> float:
        # Scales, padding and factors take up to a bit.
        return self.bits + 1

    def order(self, gram: Tensor, static: bool = False) -> Tensor:  # noqa: ARG002
        """Columns by falling energy; those of a step stay together, and a column without a partner comes last."""
        energy, columns = gram.diagonal(), self.columns
        whole = len(energy) // columns * columns
        steps = torch.argsort(energy[:whole].view(-1, columns).sum(1), descending=True, stable=True)
        places = torch.arange(columns, dtype=torch.int64, device=gram.device)
        rest = torch.arange(whole, len(energy), dtype=torch.int64, device=gram.device)
        return torch.cat([(steps.unsqueeze(1) * columns + places).flatten(), rest])

    def rounder(
        self,
        weight: Tensor,
        rows: Sequence[int],
        order: Tensor | None,
        pivots: Tensor,  # noqa: ARG002
        importance: Tensor | None,
        static: bool,  # noqa: ARG002
    ) -> TrellisRounder:
        """`order` must keep the columns of a step together, as that of `order` does."""
        return TrellisRounder(self, weight, rows, order, importance)

    def nearest(self, weight: Tensor, rows: Sequence[int]) -> TrellisRounded:
        rounder = TrellisRounder(self, weight, rows, None, None)
        for part in blocks(rounder):
            columns = weight.T[part]
            eye = torch.eye(len(columns), dtype=torch.float32, device=weight.device)
            rounder.round(part, columns, columns, eye, eye.diagonal())
        return rounder.rounded()

    def refine(self, weight: Tensor, gram: Tensor, rounded: Rounded, sweeps: int) -> TrellisRounded:  # noqa: ARG002
        """Fit each row's scale by least squares."""
        assert isinstance(rounded, TrellisRounded)
        return replace(rounded, scales=fit_row_scales(weight, rounded.levels(), gram, rounded.scales))


class TrellisRounder(Rounder):
    """See `TrellisQuantizer.rounder`."""

    def __init__(
        self,
        quantizer: TrellisQuantizer,
        weight: Tensor,
        rows: Sequence[int],
        order: Tensor | None,
        importance: Tensor | None,
    ) -> None:
        (m, n), self._quantizer, columns = weight.shape, quantizer, quantizer.columns
        self._steps = torch.arange(n, dtype=torch.int64, device=weight.device) if order is None else order
        self._strips = strips_of(rows, quantizer.strip)
        deviation = table(quantizer.window, columns).std(correction=0).item()
        scales = weight.square().mean(1).sqrt() * (_SPREAD[quantizer.bits] / deviation)
        # Rows of zeros: any scale whose inverse is a number.
        self._scales = rounded_scale(torch.where(scales > 0, scales, 1.0))
        # Errors are in units of the scales. A strip moves them from rows that count much to rows that count little.
        counts = self._scales.square() * (1 if importance is None else importance)
        self._importance = counts / counts.mean().clamp_min(torch.finfo(torch.float32).tiny)
        self._states = torch.empty(-(-n // columns), m, dtype=torch.int16, device=weight.device)
        self.cuts = [*range(0, n, _BLOCK), n]

    def round(self, part: slice, columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor) -> Tensor:
        quantizer, width = self._quantizer, len(columns)
        alone = width % quantizer.columns
        columns, target = columns / self._scales, target / self._scales
        if alone:
            # A partner without weight: its value goes unused.
            columns, target = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (columns, target))
            upper, pivots = torch.nn.functional.pad(upper, (0, 1, 0, 1)), torch.nn.functional.pad(pivots, (0, 1))
        error, states = search(columns)(
            columns, target, upper, pivots, self._importance, self._strips, round(quantizer.bits * quantizer.columns),
            quantizer.columns, quantizer.window,
        )  # fmt: skip
        places = self._steps[part][:: quantizer.columns] // quantizer.columns
        self._states[places] = states
        return error[:width] * self._scales

    def rounded(self) -> TrellisRounded:
        own = self._quantizer
        width = len(self._steps)
        return TrellisRounded(
            self._states.T.contiguous(), self._scales, width, float(own.bits), own.columns, own.window, own.strip
        )
