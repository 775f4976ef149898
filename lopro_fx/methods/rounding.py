"""Base of methods that round to the format "affine": their settings, row units, and the packing of a solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.layer import Factor, Layer
from lopro_fx.methods import checks
from lopro_fx.methods.base import Context, Method, Solved, Unit, setting
from lopro_fx.methods.lowrank import in_unit
from lopro_fx.methods.observers import Gram, Magnitude, Observer, Statistics
from lopro_fx.methods.prior import informed
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import divided, row_units, stored_factor_scale

GROUP_SIZES = (32, 64, 128, -1)
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Rounding(Method):
    """Method that stores codes with a scale and a zero per column group.

    Args:
        bits: width of a weight's code: 2, 3, 4 or 8.
        group_size: input columns that share a scale and a zero: 32, 64, 128, or -1 for the whole row.
        clip_steps: clipping ranges tried for each group by squared error; 0 keeps min and max.
    """

    bits: int = setting(3, "of a weight's code: 2, 3, 4 or 8 (default: 3)")
    group_size: int = setting(64, f"columns that share a scale: {', '.join(map(str, GROUP_SIZES))} (default: 64)")
    clip_steps: int = 24
    name: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice(self, "bits", BITS)
        checks.choice(self, "group_size", GROUP_SIZES)
        checks.whole(self, "clip_steps", 0, 1000)

    def most_bits(self) -> float:
        # Scales, zeros and factors take up to a bit.
        return self.bits + 1

    def observers(self) -> Sequence[Observer]:
        return Gram(), Magnitude()

    def solve(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        return pack_solution(unit, self.solution(unit.weights, seen, context.generator), self.bits)

    def solution(self, weights: Sequence[Tensor], stats: Statistics, generator: torch.Generator) -> GroupSolution:
        """Quantise the weights (m_i, n) of Linears that share an input.

        Args:
            weights: floating-point matrices of equal width; each row may have any magnitude within fp32.
            stats: Gram and magnitude of the shared input.
            generator: source of every random choice.
        """
        rows = [weight.shape[0] for weight in weights]
        joint = torch.cat([weight.to(torch.float32) for weight in weights])
        units = row_units(joint)
        joint, unit = divided(joint, units), units.amax().item() or 1.0
        return _in_units(self.solve_rows(joint, units / unit, rows, informed(stats), generator), units, unit)

    def solve_rows(
        self, joint: Tensor, share: Tensor, rows: list[int], stats: Statistics, generator: torch.Generator
    ) -> GroupSolution:
        """Quantise the row-wise concatenation `joint` (sum(rows), n) fp32 of a unit's weights, in units of their rows.

        `share` (m, 1) fp32 holds powers of two that take the rows to one unit: that of the errors, and of the result's
        up factors and loss.
        """
        raise NotImplementedError


def pack_solution(unit: Unit, solution: GroupSolution, bits: int) -> Solved:
    """Pack a solution and split it into the unit's layers."""
    rows = [weight.shape[0] for weight in unit.weights]
    shared = unit.input(transform=solution.transform, down=_stored(solution.down))
    metrics = {"transform": solution.choice, "relative_loss": solution.relative, "damp": solution.damp}
    ups = solution.ups or (None,) * len(rows)
    layers = (
        Layer(name, unit.name, part.packed(bits), _stored(up), dict(metrics))
        for name, part, up in zip(unit.names, solution.rounded.split(rows), ups, strict=True)
    )
    return Solved(shared, tuple(layers))


def _stored(factor: Factor | None) -> Factor | None:
    """Convert a factor to its stored form."""
    if factor is None:
        return None
    scale = None if factor.scale is None else stored_factor_scale(factor.scale).contiguous()
    return replace(factor, values=factor.values.contiguous(), scale=scale)


def _in_units(solution: GroupSolution, units: Tensor, unit: float) -> GroupSolution:
    """Undo the division of the weights by `units` (m, 1), whose largest is `unit`, in their solution."""
    losses: Mapping[str, Any] = solution.losses
    return replace(
        solution,
        rounded=replace(solution.rounded, scales=solution.rounded.scales * units),
        ups=tuple(in_unit(up, unit) for up in solution.ups),
        loss=solution.loss * unit**2,
        losses={name: loss * unit**2 for name, loss in losses.items()},
    )
