"""FLRQ: a low-rank branch whose rank each unit chooses, and rounding, in alternation (arXiv 2601.05684).

There is no rotation: the branch takes what stretches the range of the weights. Linears of a unit read one tensor and
share the down factor, so the rank is chosen for their weights together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.kernels.formats.quantizer import Rounded
from lopro_fx.layer import Transform
from lopro_fx.methods import checks
from lopro_fx.methods.base import setting
from lopro_fx.methods.flexible_rank import Stopping, flexible_rank, range_rms, sized, sized_by_loss
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

STATISTICS = ("loss", "range", "amax")


@dataclass(frozen=True, kw_only=True)
class FLRQ(Rounding):
    """Flexible low-rank branch, without a rotation (arXiv 2601.05684).

    Components are taken off the weights of a unit until one of three rules stops (see `flexible_rank`). Then rounding
    and factors alternate, and the iterate of least loss is kept.

    Args:
        rank_budget: bits of the factors, at most this part of `bits` (the paper's x).
        factor_bits: 8 (int8, one fp16 scale a component) or 16 (fp16).
        statistic: what components must make smaller by more bits than they cost. "loss": root of the loss of weights
            that are rounded without a branch. "range": root mean square of what fixes the quantiser's scales, which are
            the ranges of the column groups, or the RMS of rows where a format has a scale a row. "amax": the largest
            magnitude of the scaled weights (the paper).
        least_gain: bits that components must gain for each that they cost. More than 1 makes ranks smaller.
        slope_window: components whose gain is compared with `least_drop`. Where it is less, half of them are taken
            back. 0 compares none.
        least_drop: part by which a window's components must make the statistic smaller; None takes what is worth
            `least_gain` of their bits.
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

    rank_budget: float = setting(0.2, "of FLRQ's low-rank branch: part of the weights' bits, at most (default: 0.2)")
    factor_bits: int = 8
    statistic: str = "loss"
    least_gain: float = 1.0
    slope_window: int = 8
    least_drop: float | None = None
    low_rank: str = "block_svd"
    power_iterations: int = 2
    scale_power: float = 2.5
    epochs: int = 4
    refit: bool = True
    feedback: bool = True
    sweeps: int = 2
    damp: float = 0.01
    name: ClassVar[str] = "flrq"
    default_asymmetry: ClassVar[float] = 0.4
    of_language_models: ClassVar[Mapping[str, Any]] = {**Rounding.of_language_models, "importance": "gradient"}

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(self, "rank_budget", 0, 8)
        checks.choice(self, "factor_bits", FACTOR_BITS)
        checks.choice(self, "statistic", STATISTICS)
        checks.at_least(self, "least_gain", 0, 100)
        checks.whole(self, "slope_window", 0, 4096)
        if self.least_drop is not None:
            checks.at_least(self, "least_drop", 0, 0.99)
        checks.choice(self, "low_rank", LOW_RANK)
        checks.whole(self, "power_iterations", 0, 64)
        checks.at_least(self, "scale_power", 0, 8)
        checks.whole(self, "epochs", 1, 100)
        checks.flag(self, "refit")
        if self.statistic == "loss" and not self.refit:
            raise ConfigError(
                "FLRQ(statistic='loss', refit=False): factors that lower the loss of a rounding are a refit; take "
                "refit=True, or another statistic"
            )
        checks.flag(self, "feedback")
        checks.whole(self, "sweeps", 0, 32)
        checks.at_least(self, "damp", 0, 10)

    @property
    def unknown_size(self) -> str | None:
        return "chooses ranks while it solves"

    @classmethod
    def paper(cls, **changes: Any) -> FLRQ:
        """The paper's choices: groups of 128, fp16 factors from sketches of the scaled weights, rounding to nearest,
        20 epochs at 2 bits and one at more."""
        choices: dict[str, Any] = {
            "group_size": 128,
            "factor_bits": 16,
            "statistic": "amax",
            "least_drop": 0.1,
            "low_rank": "r1_sketch",
            "epochs": 20 if changes.get("bits", cls.bits) <= 2 else 1,
            "refit": False,
            "feedback": False,
            "token_clip": 0,
            "asymmetry": 0.0,
        }
        return cls(**{**choices, **changes})

    @property
    def joint(self) -> bool:
        return True

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None,
    ) -> GroupSolution:
        weights, late = stats.row_scale(share), self.statistic == "loss"
        rounding, damp = self._rounding(rows, share, stats)
        branch = None if late else self._flexible(joint, share, rows, stats, generator)
        best, whole, error = None, joint * weights, joint
        for epoch in range(self.epochs):
            if epoch and not self.refit:
                branch = self._flexible(error, share, rows, stats, generator)
            rounded = rounding(joint if branch is None else joint - branch.dense(share))
            error = joint - rounded.dense()
            if late and not epoch:
                branch = self._flexible(error, share, rows, stats, generator)
            elif branch is not None and self.refit:
                up, down = correction(error, stats.gram, branch.down.rank, self.factor_bits, generator, weights)
                branch = round_branch(up, down, share, rows, self.factor_bits)
            left = error if branch is None else error - branch.dense(share)
            loss = proxy_loss(left * weights, stats.gram)
            if best is None or loss < best.loss:
                down, ups = (branch.down, branch.ups) if branch else (None, ())
                relative = relative_loss(loss, whole, stats.gram)
                best = GroupSolution(transform or Transform(), rounded, down, ups, loss, relative, damp, "identity")
            if branch is None and self.refit:
                break
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

    def _flexible(
        self, matrix: Tensor, share: Tensor, rows: list[int], stats: Statistics, generator: torch.Generator
    ) -> Branch | None:
        """Take a branch of flexible rank off `matrix` (m, n), in units of the rows; None if its rank is 0."""
        weights, (m, n) = stats.row_scale(share), matrix.shape
        scale, weighed = 1.0, matrix * weights
        if self.low_rank == "block_svd":
            found = block_components(weighed, stats.gram, generator, self.power_iterations)
        else:
            scale = column_scale(stats.magnitude, self.scale_power)
            sketched = r1_components(weighed * scale, generator, self.power_iterations)
            found = ((u, v / scale) for u, v in sketched)
        if self.statistic == "loss":
            loss = proxy_loss(weighed, stats.gram)
            size, components = math.sqrt(loss), sized_by_loss(weighed, stats.gram, loss, found)
        else:

            def measure(remainder: Tensor) -> float:
                if self.statistic == "range":
                    return range_rms(remainder, self.group_size)
                return (remainder * scale).abs().amax().item()

            size, components = measure(weighed), sized(weighed, found, measure)
        left, right = flexible_rank(size, components, self._stopping(m, n, len(rows)))
        if not right:
            return None
        # Of length 1, so that fp16 holds them.
        vectors = torch.stack(right)
        length = vectors.norm(dim=1)
        down = round_factor(vectors / length.unsqueeze(1), self.factor_bits, 0)
        up = divided(torch.stack(left, 1) * length, weights)
        if self.refit:
            up = fit_up(matrix, stats.gram, down.dense())
        return round_branch(up, down, share, rows, self.factor_bits)

    def _stopping(self, m: int, n: int, layers: int) -> Stopping:
        # What a component takes in a file, see `round_factor`.
        scales = 16 * (1 + layers) if self.factor_bits == 8 else 0
        price = (self.factor_bits * (m + n) + scales) / (m * n)
        slope = None if self.least_drop is None else -math.log2(1 - self.least_drop)
        return Stopping(price, self.rank_budget * self.bits, self.least_gain, self.slope_window, slope)
