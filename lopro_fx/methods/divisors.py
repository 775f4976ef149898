"""Rounding of one weight to the format "affine" with learned divisors (LRQ, 2407.11534; FlexRound, 2306.00317).

    What = s exp(d) * (clamp(round(t / exp(D) + z), 0, 2^bits - 1) - z)        D = L U + r + c, or a matrix

t is the weight in steps: W / s, or next to the code at hand where that differs from the nearest one, so that at first
every code is the one at hand. D decides codes alone, d is the learned part of the scale. In the papers d divides too:
then codes that feedback has moved off the nearest would fall back with the first change of a scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET, unpack
from lopro_fx.kernels.formats.affine.rounded import AffineRounded
from lopro_fx.kernels.formats.packed import Packed, stacked
from lopro_fx.kernels.formats.scales import rounded_scale

# Distance from the edge of a code at which t is put where the code at hand is not the nearest.
_EDGE = 1e-3


class LearnedRounding:
    """Parameters of the rounding of one packed weight, or of experts.

    Args:
        packed: the solution at hand, of format "affine".
        target: fp32, of its shape: the weight that it stands for, in its coordinates.
        rank: of the divisors; None gives each weight a divisor of its own (FlexRound).
        generator: of the first U, which the paper draws as a Linear's weight.
    """

    def __init__(self, packed: Packed, target: Tensor, rank: int | None, generator: torch.Generator) -> None:
        self._packed, self._shape = packed, packed.shape
        parts = [packed.expert(index) for index in range(packed.experts)] if packed.experts else [packed]
        self._parts = [_unpacked(part) for part in parts]
        bits, size = self._parts[0].bits, self._parts[0].group_size
        rows, columns = len(parts) * packed.shape[-2], packed.shape[-1]
        device = target.device
        self._top = (1 << bits) - 1
        self._group = torch.arange(columns, dtype=torch.int64, device=device) // (columns if size == -1 else size)
        codes = torch.cat([part.codes for part in self._parts]).to(torch.float32)
        self._scales = torch.cat([part.scales for part in self._parts])
        self._zero = (torch.cat([part.zeros for part in self._parts]).to(torch.float32) + ZERO_OFFSET)[:, self._group]
        # Rows of zeros have no scale; their codes stay.
        scales = self._scales[:, self._group]
        steps = torch.where(scales > 0, target.reshape(rows, columns) / scales + self._zero, codes)
        kept = steps.round().clamp(0, self._top) == codes
        inside = 0.5 - _EDGE
        steps = torch.where(kept, steps, torch.minimum(torch.maximum(steps, codes - inside), codes + inside))
        self._steps = steps - self._zero
        self._log_scale = torch.zeros_like(self._scales)
        self._row, self._column = _zeros(rows, 1, device), _zeros(1, columns, device)
        self._full = _zeros(rows, columns, device) if rank is None else None
        self._left, self._right = _zeros(rows, rank or 0, device), _zeros(rank or 0, columns, device)
        if rank:
            bound = 1 / math.sqrt(columns)
            drawn = torch.rand(rank, columns, generator=generator, dtype=torch.float32, device="cpu")
            self._right = (drawn * (2 * bound) - bound).to(device)
        for parameter in (*self.divisors, self._log_scale):
            parameter.requires_grad_()

    @property
    def divisors(self) -> list[Tensor]:
        """Parameters of D."""
        own = [self._full] if self._full is not None else [self._left, self._right] if self._left.numel() else []
        return [*own, self._row, self._column]

    @property
    def scales(self) -> list[Tensor]:
        """Parameters of the scales."""
        return [self._log_scale]

    @property
    def numbers(self) -> int:
        """Number of learned numbers."""
        return sum(parameter.numel() for parameter in (*self.divisors, *self.scales))

    def weight(self) -> Tensor:
        """Dense weight fp32, of the packed one's shape; rounding has the gradient of the identity."""
        scales, codes = self._scales * self._log_scale.exp(), self._codes()
        return ((codes - self._zero) * scales[:, self._group]).view(self._shape)

    def packed(self) -> Packed:
        """The packed weight; scales are rounded to what the format stores."""
        with torch.no_grad():
            codes, scales = self._codes().to(torch.uint8), rounded_scale(self._scales * self._log_scale.exp())
        rows, found = self._shape[-2], []
        for part, own, scale in zip(self._parts, codes.split(rows), scales.split(rows), strict=True):
            found.append(AffineRounded(own, scale, part.zeros, part.bits, part.group_size).packed())
        return stacked(found) if self._packed.experts else found[0]

    def values(self) -> list[Tensor]:
        """Copies of all parameters, for `restore`."""
        return [parameter.detach().clone() for parameter in (*self.divisors, *self.scales)]

    def restore(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip((*self.divisors, *self.scales), values, strict=True):
                parameter.copy_(value)

    def _codes(self) -> Tensor:
        divisor = self._row + self._column
        if self._full is not None:
            divisor = divisor + self._full
        elif self._left.numel():
            divisor = divisor + self._left @ self._right
        steps = self._steps / divisor.exp() + self._zero
        return (steps + (steps.round() - steps).detach()).clamp(0, self._top)


@dataclass(frozen=True)
class _Unpacked:
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int


def _unpacked(packed: Packed) -> _Unpacked:
    bits, size = int(packed.spec["bits"]), int(packed.spec["group_size"])
    own, scales = packed.tensors, packed.tensors["scales"]
    codes = unpack(own["codes"], bits, packed.shape[-1])
    zeros = unpack(own["zeros"], bits, scales.numel()).view(scales.shape).to(torch.uint8)
    return _Unpacked(codes, scales.to(torch.float32), zeros, bits, size)


def _zeros(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float32, device=device)
