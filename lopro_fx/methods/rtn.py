"""Rounding to nearest, one column group at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lopro_fx.kernels.formats.affine.packing.format import ZERO_OFFSET
from lopro_fx.layer import Transform
from lopro_fx.methods.grid import fit_grid
from lopro_fx.methods.ldlq import proxy_loss, relative_loss
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.rounded import Rounded
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import divided, row_units

# Rows rounded at once: fp32 copies of a whole output projection, with the vocabulary's rows, would fill the memory.
_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class RTN(Rounding):
    """Rounding to nearest. Needs no calibration; with one, it is only used to report errors."""

    name: ClassVar[str] = "rtn"
    needs_data: ClassVar[bool] = False

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
    ) -> GroupSolution:
        rounded = round_to_nearest(joint, self.bits, self.group_size, self.clip_steps)
        loss = proxy_loss((joint - rounded.dense()) * share, stats.gram)
        relative = relative_loss(loss, joint * share, stats.gram)
        return GroupSolution(Transform(), rounded, None, (), loss, relative, 0.0, "identity")


def round_to_nearest(weight: Tensor, bits: int, group_size: int, clip_steps: int) -> Rounded:
    """Round W (m, n) fp32, rows in units of their own; arguments as in `ldlq.round_with_feedback`."""
    codes, scales, zeros = [], [], []
    for block in weight.T.split(weight.shape[1] if group_size == -1 else group_size):
        grid = fit_grid(block, bits, None, clip_steps)
        codes.append(grid.round(block))
        scales.append(grid.scale)
        zeros.append(grid.zero - ZERO_OFFSET)
    code = torch.uint8
    return Rounded(
        torch.cat(codes).T.to(code).contiguous(),
        torch.stack(scales, 1),
        torch.stack(zeros, 1).to(code),
        group_size,
    )


def solve_data_free(weight: Tensor, bits: int, group_size: int, clip_steps: int) -> GroupSolution:
    """Round one weight (m, n) of any float type, every input direction counting the same."""
    parts, loss, whole = [], 0.0, 0.0
    unit = row_units(weight.abs().amax().view(1, 1).to(torch.float32)).item() or 1.0
    for rows in weight.split(_ROWS):
        dense = rows.to(torch.float32)
        units = row_units(dense)
        part = round_to_nearest(divided(dense, units), bits, group_size, clip_steps)
        part = replace(part, scales=part.scales * units)
        loss += ((dense - part.dense()) / unit).square().sum().item()
        whole += (dense / unit).square().sum().item()
        parts.append(part)
    rounded = Rounded(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        group_size,
    )
    relative = loss / whole if whole > 0 else 0.0
    return GroupSolution(Transform(), rounded, None, (), loss * unit**2, relative, 0.0, "identity")
