"""Rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lopro_fx.kernels.formats.quantizer import Quantizer
from lopro_fx.layer import Transform
from lopro_fx.methods.base import Method
from lopro_fx.methods.ldlq import proxy_loss, relative_loss
from lopro_fx.methods.observers import Statistics
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
        transform: Transform | None,
    ) -> GroupSolution:
        rounded = self.quantizer.nearest(joint, rows)
        loss = proxy_loss((joint - rounded.dense()) * share, stats.gram)
        relative = relative_loss(loss, joint * share, stats.gram)
        return GroupSolution(transform or Transform(), rounded, None, (), loss, relative, 0.0, "identity")


def head_method(method: Method) -> RTN:
    """Return what rounds output projections, with the settings of `method` that it has too."""
    shared = {name: getattr(method, name, None) for name in ("group_size", "clip_steps")}
    return RTN(bits=method.head_bits, **{name: value for name, value in shared.items() if value is not None})


def solve_data_free(weight: Tensor, quantizer: Quantizer) -> GroupSolution:
    """Round one weight (m, n) of any float type, every input direction counting the same."""
    parts, loss, whole = [], 0.0, 0.0
    unit = row_units(weight.abs().amax().view(1, 1).to(torch.float32)).item() or 1.0
    for rows in weight.split(_ROWS):
        dense = rows.to(torch.float32)
        units = row_units(dense)
        part = quantizer.nearest(divided(dense, units), (len(rows),)).times(units)
        loss += ((dense - part.dense()) / unit).square().sum().item()
        whole += (dense / unit).square().sum().item()
        parts.append(part)
    relative = loss / whole if whole > 0 else 0.0
    return GroupSolution(Transform(), quantizer.join(parts), None, (), loss * unit**2, relative, 0.0, "identity")
