"""GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lopro_fx.layer import Transform
from lopro_fx.methods import checks
from lopro_fx.methods.ldlq import feedback, proxy_loss, relative_loss, round_with_feedback
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.rotation import as_index, energy_order
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.solution import GroupSolution


@dataclass(frozen=True, kw_only=True)
class GPTQ(Rounding):
    """Rounding with error feedback (Frantar et al., 2210.17323).

    Args:
        damp: part of the Gram's mean diagonal added to its diagonal; raised tenfold until a factorisation exists.
        act_order: round columns in order of falling activation energy. "column" also stores them in that order, with a
            permutation that gathers the activation; "static" fits every grid before rounding and needs none; "group"
            ranks whole groups and needs none; "none" keeps storage order.
        token_clip: off by default, as in the original method.
    """

    damp: float = 0.01
    act_order: str = "static"
    token_clip: float = 0.0
    name: ClassVar[str] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(self, "damp", 0, 10)
        checks.choice(self, "act_order", ("none", "group", "static", "column"))

    def transform(self, joint: Tensor, stats: Statistics, generator: torch.Generator) -> Transform:
        return Transform(perm=as_index(energy_order(stats.gram))) if self.act_order == "column" else Transform()

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None,
    ) -> GroupSolution:
        gram = stats.gram
        transform, order = transform or self.transform(joint, stats, generator), self._order(gram)
        target, moved = transform.forward(joint), transform.gram(gram)
        fb = feedback(moved if order is None else moved[order][:, order], self.damp)
        static = self.act_order == "static"
        importance = share.square().squeeze(1)
        rounded = round_with_feedback(
            target, fb, self.quantizer, rows, order=order, importance=importance, static=static
        )
        rounded = self.quantizer.refine(target, moved, rounded, 0)
        loss = proxy_loss((target - rounded.dense()) * share, moved)
        relative = relative_loss(loss, joint * share, gram)
        return GroupSolution(transform, rounded, None, (), loss, relative, fb.damp, f"act_order={self.act_order}")

    def _order(self, gram: Tensor) -> Tensor | None:
        """Rounding order of the columns behind the transform; None is storage order."""
        if self.act_order in ("static", "group"):
            return self.quantizer.order(gram, self.act_order == "static")
        return None
