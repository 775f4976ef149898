"""Solution of one unit before it is packed."""

from __future__ import annotations

from dataclasses import dataclass, field

from lopro_fx.kernels.formats.quantizer import Rounded
from lopro_fx.layer import Factor, Transform


@dataclass(frozen=True)
class GroupSolution:
    """W ≈ (Q̂ + B A) Tᵀ for the row-wise concatenation W of the unit's weights.

    `loss` is tr(E H Eᵀ) and `relative` the same divided by tr(W H Wᵀ); `ups` holds one up factor per layer. `choice`
    names the transform that won, `losses` holds the proxy loss of every candidate.
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
