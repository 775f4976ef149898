"""Rounding to the format "affine" with error feedback: grids of column groups, one column at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.columns.choice import loops
from lopro_fx.kernels.formats.affine.descent import descend
from lopro_fx.kernels.formats.affine.grid import Grid
from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET, group_count
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.kernels.formats.quantizer import Quantizer, Rounded, Rounder

# Columns whose feedback is applied one at a time before a GEMM updates the rest.
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class AffineQuantizer(Quantizer):
    """Codes with a scale and a zero per column group.

    Args:
        bits: width of a code.
        group_size: columns that share a scale and a zero; -1 is the whole row.
        clip_steps: candidate clipping ranges of a group, 0 for none.
    """

    bits: int = 3
    group_size: int = 64
    clip_steps: int = 24
    allowed: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": (2, 3, 4, 8), "group_size": (32, 64, 128, -1)}

    @property
    def most_bits(self) -> float:
        # Scales, zeros and factors take up to a bit.
        return self.bits + 1

    def order(self, gram: Tensor, static: bool = False) -> Tensor:
        """Columns by falling energy; groups by that at first, unless `static`."""
        diagonal = gram.diagonal()
        if static:
            return torch.argsort(diagonal, descending=True, stable=True)
        size = diagonal.numel() if self.group_size == -1 else self.group_size
        parts = diagonal.split(size)
        energy = torch.stack([part.mean() for part in parts]).cpu().tolist()
        ranked = sorted(range(len(parts)), key=lambda i: -energy[i])
        return torch.cat([i * size + torch.argsort(parts[i], descending=True, stable=True) for i in ranked])

    def rounder(
        self,
        weight: Tensor,
        rows: Sequence[int],  # noqa: ARG002
        order: Tensor | None,
        pivots: Tensor,
        importance: Tensor | None,  # noqa: ARG002
        static: bool,
    ) -> AffineRounder:
        """Column groups must stay together in `order` unless `static`: a group's grid is fitted when its first column
        is reached."""
        return AffineRounder(self, weight, order, pivots, static)

    def nearest(self, weight: Tensor, rows: Sequence[int]) -> AffineRounded:  # noqa: ARG002
        codes, scales, zeros = [], [], []
        for block in weight.T.split(weight.shape[1] if self.group_size == -1 else self.group_size):
            grid = loops(block).fit_grid(block, self.bits, None, self.clip_steps)
            codes.append(grid.round(block))
            scales.append(grid.scale)
            zeros.append(grid.zero - ZERO_OFFSET)
        return AffineRounded(
            torch.cat(codes).T.to(torch.uint8).contiguous(),
            torch.stack(scales, 1),
            torch.stack(zeros, 1).to(torch.uint8),
            self.bits,
            self.group_size,
        )

    def join(self, parts: Sequence[Rounded]) -> AffineRounded:
        own = [part for part in parts if isinstance(part, AffineRounded)]
        return replace(
            own[0],
            codes=torch.cat([part.codes for part in own]),
            scales=torch.cat([part.scales for part in own]),
            zeros=torch.cat([part.zeros for part in own]),
        )

    def refine(self, weight: Tensor, gram: Tensor, rounded: Rounded, sweeps: int) -> AffineRounded:
        """Descent on the codes; each sweep ends with a fit of the scales."""
        assert isinstance(rounded, AffineRounded)
        return descend(weight, gram, rounded, sweeps)


class AffineRounder(Rounder):
    """See `AffineQuantizer.rounder`."""

    def __init__(
        self, quantizer: AffineQuantizer, weight: Tensor, order: Tensor | None, pivots: Tensor, static: bool
    ) -> None:
        (m, n), self._quantizer, self._loops = weight.shape, quantizer, loops(weight)
        size = n if quantizer.group_size == -1 else quantizer.group_size
        # A group of all columns comes before any feedback.
        self._static = static or size == n
        self._storage = torch.arange(n, dtype=torch.int64, device=weight.device) if order is None else order
        self._group = self._storage // size
        self._codes = weight.new_empty(n, m, dtype=torch.uint8)
        self._scales = weight.new_empty(group_count(n, quantizer.group_size), m)
        self._zeros = torch.empty_like(self._scales)
        self._ranks = self._group.cpu()  # read once: each read waits for the device
        if self._static:
            pivots = torch.empty_like(pivots).index_copy_(0, self._storage, pivots)
            for i, (block, weights) in enumerate(zip(weight.T.split(size), pivots.split(size), strict=True)):
                self._set(i, self._loops.fit_grid(block, quantizer.bits, weights, quantizer.clip_steps))
            self.cuts = [*range(0, n, _BLOCK), n]
        else:
            ends = torch.nonzero(self._ranks[1:] != self._ranks[:-1]).flatten() + 1
            self.cuts = [0, *ends.tolist(), n]

    def _set(self, group: int, grid: Grid) -> None:
        self._scales[group], self._zeros[group] = grid.scale, grid.zero

    def round(self, part: slice, columns: Tensor, target: Tensor, upper: Tensor, pivots: Tensor) -> Tensor:
        if self._static:
            groups = self._group[part]
            grid = Grid(self._scales[groups], self._zeros[groups], 1 << self._quantizer.bits)
        else:
            grid = self._loops.fit_grid(target, self._quantizer.bits, pivots, self._quantizer.clip_steps)
            self._set(int(self._ranks[part.start]), grid)
        error, self._codes[part] = self._loops.round_columns(columns, target, upper, grid)
        return error

    def rounded(self) -> AffineRounded:
        codes = torch.empty_like(self._codes).index_copy_(0, self._storage, self._codes)
        return AffineRounded(
            codes.T.contiguous(),
            self._scales.T.contiguous(),
            (self._zeros - ZERO_OFFSET).T.to(torch.uint8).contiguous(),
            self._quantizer.bits,
            self._quantizer.group_size,
        )
