"""FLRQ: a low-rank branch whose rank each unit chooses, and rounding, in alternation (arXiv 2601.05684).

There is no rotation: the branch takes what stretches the range of the weights. Linears of a unit read one tensor and
share the down factor, so the rank is chosen for their weights together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.kernels.formats.quantizer import Rounded
from lopro_fx.layer import Transform
from lopro_fx.methods import checks
from lopro_fx.methods.base import setting
from lopro_fx.methods.flexible_rank import Stopping, flexible_rank
from lopro_fx.methods.ldlq import damped, proxy_loss, relative_loss, round_with_feedback
from lopro_fx.methods.lopro import FACTOR_BITS, LOW_RANK
from lopro_fx.methods.lowrank import (
    Branch,
    block_components,
    column_scale,
    correction,
    fit_up,
    r1_components,
    round_branch,
    round_factor,
)
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.prior import informed_feedback
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import divided

STATISTICS = ("range", "amax")


@dataclass(frozen=True, kw_only=True)
class FLRQ(Rounding):
    """Flexible low-rank branch, without a rotation (arXiv 2601.05684).

    Components are taken off the weights of a unit until one of three rules stops (see `flexible_rank`). Then rounding
    and factors alternate, and the iterate of least loss is kept.

    Args:
        budget: bits of the factors, at most this part of `bits` (the paper's x).
        factor_bits: 8 (int8, one fp16 scale a component) or 16 (fp16).
        statistic: what a component must narrow. "range": root mean square of what fixes the quantiser's scales, which
            are the ranges of the column groups, or the RMS of rows where a format has one scale a row. "amax": the
            largest magnitude of the scaled weights (the paper).
        slope_window: components over which the statistic must fall by the part `slope_drop`. Where it does not, half of
            them are taken back. 0 asks for no slope.
        slope_drop: see `slope_window`.
        low_rank: "block_svd" (components of the best approximation in the norm of the Gram) or "r1_sketch" (the
            paper's rank-one sketches of the scaled weights).
        power_iterations: of either, each two passes over the matrix.
        scale_power: of "r1_sketch": exponent of the activations' mean magnitude in the scale of the columns; 0 does not
            scale.
        epochs: times the weights are rounded. The paper's T.
        refit: whether the factors are solved again, at the same rank, for the rounding error in the norm of the Gram.
            Without, the paper's flexible rank is searched again in what the rounding leaves.
        feedback: whether to round with error feedback (see `GPTQ`), or to nearest (the paper).
        sweeps: with feedback: coordinate-descent passes over codes and scales after each rounding.
        damp: with feedback: as in GPTQ, beside what `prior.shrinkage` adds.
    """

    budget: float = setting(0.2, "of FLRQ's low-rank branch: part of the weights' bits that it may take (default: 0.2)")
    factor_bits: int = 8
    statistic: str = "range"
    slope_window: int = 8
    slope_drop: float = 0.1
    low_rank: str = "block_svd"
    power_iterations: int = 2
    scale_power: float = 2.5
    epochs: int = 2
    refit: bool = True
    feedback: bool = True
    sweeps: int = 2
    damp: float = 0.01
    name: ClassVar[str] = "flrq"
    of_language_models: ClassVar[Mapping[str, Any]] = {**Rounding.of_language_models, "importance": "gradient"}

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(self, "budget", 0, 8)
        checks.choice(self, "factor_bits", FACTOR_BITS)
        checks.choice(self, "statistic", STATISTICS)
        checks.whole(self, "slope_window", 0, 4096)
        checks.at_least(self, "slope_drop", 0, 1)
        checks.choice(self, "low_rank", LOW_RANK)
        checks.whole(self, "power_iterations", 0, 64)
        checks.at_least(self, "scale_power", 0, 8)
        checks.whole(self, "epochs", 1, 100)
        checks.flag(self, "refit")
        checks.flag(self, "feedback")
        checks.whole(self, "sweeps", 0, 32)
        checks.at_least(self, "damp", 0, 10)

    @classmethod
    def paper(cls, **changes: Any) -> FLRQ:
        """The paper's choices: groups of 128, fp16 factors from sketches of the scaled weights, rounding to nearest,
        20 epochs at 2 bits and one at more."""
        choices: dict[str, Any] = {
            "group_size": 128,
            "factor_bits": 16,
            "statistic": "amax",
            "low_rank": "r1_sketch",
            "epochs": 20 if changes.get("bits", cls.bits) <= 2 else 1,
            "refit": False,
            "feedback": False,
            "token_clip": 0,
        }
        return cls(**{**choices, **changes})

    def solve_rows(
        self, joint: Tensor, share: Tensor, rows: list[int], stats: Statistics, generator: torch.Generator
    ) -> GroupSolution:
        gram, weights = stats.gram, stats.row_scale(share)
        rounding, damp = self._rounding(rows, share, stats)
        branch, best = self._extracted(joint, share, rows, stats, generator), None
        whole = joint * weights
        for epoch in range(self.epochs):
            rounded = rounding(joint if branch is None else joint - branch.dense(share))
            error = joint - rounded.dense()
            if branch is not None and self.refit:
                up, down = correction(error, gram, branch.down.rank, self.factor_bits, generator, weights)
                branch = round_branch(up, down, share, rows, self.factor_bits)
            left = error if branch is None else error - branch.dense(share)
            loss = proxy_loss(left * weights, gram)
            if best is None or loss < best.loss:
                down, ups = (branch.down, branch.ups) if branch else (None, ())
                relative = relative_loss(loss, whole, gram)
                best = GroupSolution(Transform(), rounded, down, ups, loss, relative, damp, "identity")
            if self.refit:
                if branch is None:
                    break
            elif epoch + 1 < self.epochs:
                branch = self._extracted(error, share, rows, stats, generator)
        assert best is not None
        return best

    def _rounding(self, rows: list[int], share: Tensor, stats: Statistics) -> tuple[Callable[[Tensor], Rounded], float]:
        """Return what rounds a matrix (m, n), and the damping that it needs."""
        quantizer = self.quantizer
        if not self.feedback:
            return lambda target: quantizer.nearest(target, rows), 0.0
        order, importance = quantizer.order(stats.gram), stats.row_scale(share).square().squeeze(1)
        fb, damp = informed_feedback(stats.gram, order, self.damp, stats)
        hessian = damped(stats.gram, fb.damp)

        def rounding(target: Tensor) -> Rounded:
            rounded = round_with_feedback(target, fb, quantizer, rows, order=order, importance=importance)
            return quantizer.refine(target, hessian, rounded, self.sweeps)

        return rounding, damp

    def _extracted(
        self, matrix: Tensor, share: Tensor, rows: list[int], stats: Statistics, generator: torch.Generator
    ) -> Branch | None:
        """Take a branch of flexible rank off `matrix` (m, n), in units of the rows; None if its rank is 0."""
        weights, (m, n) = stats.row_scale(share), matrix.shape
        scale = matrix.new_ones(n)
        if self.low_rank == "block_svd":
            weighed = matrix * weights
            components = block_components(weighed, stats.gram, generator, self.power_iterations)
        else:
            scale = column_scale(stats.magnitude, self.scale_power)
            weighed = matrix * weights * scale
            components = r1_components(weighed, generator, self.power_iterations)
        group = self.group_size

        def spread(remainder: Tensor) -> float:
            if self.statistic == "amax":
                return remainder.abs().amax().item()
            return range_rms(remainder / scale, group)

        scales = 0 if self.factor_bits == 16 else 16 * (1 + len(rows))
        price = (self.factor_bits * (m + n) + scales) / (m * n)
        stopping = Stopping(price, self.budget * self.bits, self.slope_window, self.slope_drop)
        left, right = flexible_rank(weighed, components, spread, stopping)
        if not len(right):
            return None
        down = round_factor(right / scale, self.factor_bits, 0)
        up = fit_up(matrix, stats.gram, down.dense()) if self.refit else divided(left, weights)
        return round_branch(up, down, share, rows, self.factor_bits)


def range_rms(matrix: Tensor, group_size: int | None) -> float:
    """Root mean square, over rows and column groups, of the range that a quantiser's grid covers: from the least weight
    or 0 to the largest or 0. -1 takes whole rows; None returns the root mean square of the weights."""
    if group_size is None:
        return matrix.square().mean().sqrt().item()
    parts = matrix.split(matrix.shape[1] if group_size == -1 else group_size, 1)
    ranges = torch.stack([part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0) for part in parts])
    return ranges.square().mean().sqrt().item()
