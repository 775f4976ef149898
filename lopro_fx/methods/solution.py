"""What a method returns for one group of Linears."""

from __future__ import annotations

from dataclasses import dataclass, field

from lopro_fx.layer import Factor, Transform
from lopro_fx.methods.rounded import Rounded


@dataclass(frozen=True)
class GroupSolution:
    """W ≈ (Q̂ + B A) Tᵀ for the row-wise concatenation W of the group's weights.

    `loss` is tr(E H Eᵀ) and `relative` the same divided by tr(W H Wᵀ); `ups` holds one up factor a site. `choice` names
    the transform that won, `losses` the proxy loss of every candidate that was tried.
    """

    transform: Transform
    rounded: Rounded
    down: Factor | None
    ups: tuple[Factor, ...]
    loss: float
    relative: float
    damp: float
    choice: str
    losses: dict[str, float] = field(default_factory=dict)
