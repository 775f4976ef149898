"""LoPRo: permuted block-wise rotation, error-feedback rounding and, if asked for, a low-rank branch (2601.19675).

One call solves all Linears of a unit. They share the transform and the down factor, since they read the same tensor;
each has its own codes, scales, zeros and up factor. Everything after the transform is solved in rotated coordinates, so
at run time only x' = Tᵀ x is needed (the paper's low-rank branch reads the raw x and keeps a scale vector).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.layer import Transform
from lopro_fx.methods import checks, rotation
from lopro_fx.methods.base import setting
from lopro_fx.methods.ldlq import Feedback, damped, proxy_loss, round_with_feedback
from lopro_fx.methods.lowrank import (
    Branch,
    column_scale,
    correction,
    factor_bytes,
    fit_up,
    gram_components,
    r1_sketch,
    round_branch,
    round_factor,
)
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.prior import informed_feedback
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import divided

# Exponent of the activation scale in the released code (LoPRo section 3.2).
_SCALE_POWER = 2.4
FACTOR_BITS = (8, 16)
TRANSFORMS = ("identity", "act_order", "partial", "full")
LOW_RANK = ("block_svd", "r1_sketch")


@dataclass(frozen=True, kw_only=True)
class LoPRo(Rounding):
    """Permuted block-wise rotation with a low-rank branch (arXiv 2601.19675).

    Args:
        rank: components of the low-rank branch; 0 leaves it out. The same bytes in codes measured better (see
            benchmarks/results).
        factor_bits: 8 (int8, one fp16 scale a component) or 16 (fp16).
        transforms: candidates among "identity" (no permutation, no rotation), "act_order" (columns by energy, not
            rotated), "partial" (permuted by importance, the salient block not rotated) and "full" (random signs, every
            column rotated; where Hadamard blocks differ, permuted at random before). With several, each unit keeps the
            one of least proxy loss. "full" alone measured better: the loss on calibration text misjudges "partial" (see
            benchmarks/results).
        block_size: largest Hadamard block; the block used is the largest power of two that divides the width.
        salient: columns that "partial" leaves alone (the paper's b_I).
        signs: random signs before the Hadamard blocks of "partial".
        low_rank: "block_svd" (randomised subspace iteration) or "r1_sketch" (the paper's rank-one deflation).
        power_iterations: of either solver of the first factors, each two passes over the matrix.
        refits: times the factors are solved again for the rounding error, with the weights rounded around them; the
            best iterate is kept. 0 is the paper: factors once, from the weights alone.
        sweeps: coordinate-descent passes over codes and scales after each rounding, one product E H each.
        damp: as in GPTQ, beside what `prior.shrinkage` adds.
    """

    rank: int = setting(0, "of the low-rank branch (default: 0 for lopro, by --factor-share for lrc)")
    factor_bits: int = 8
    transforms: tuple[str, ...] = ("full",)
    block_size: int = 256
    salient: int = 64
    signs: bool = True
    low_rank: str = "block_svd"
    power_iterations: int = 2
    refits: int = 2
    sweeps: int = 2
    damp: float = 0.01
    name: ClassVar[str] = "lopro"
    default_asymmetry: ClassVar[float] = 0.4
    of_language_models: ClassVar[Mapping[str, Any]] = {**Rounding.of_language_models, "importance": "gradient"}

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.transforms
        object.__setattr__(self, "transforms", (value,) if isinstance(value, str) else tuple(value))
        if not self.transforms:
            raise ConfigError(f"LoPRo(transforms=()): name at least one of {', '.join(TRANSFORMS)}")
        for name in self.transforms:
            if name not in TRANSFORMS:
                raise ConfigError(
                    f"LoPRo(transforms={self.transforms!r}): {name!r} is not one of {', '.join(TRANSFORMS)}"
                )
        checks.whole(self, "rank", 0, 4096)
        checks.choice(self, "factor_bits", FACTOR_BITS)
        checks.choice(self, "block_size", tuple(1 << i for i in range(11)))
        checks.whole(self, "salient", 0, 1 << 20)
        checks.flag(self, "signs")
        checks.choice(self, "low_rank", LOW_RANK)
        checks.whole(self, "power_iterations", 0, 64)
        checks.whole(self, "refits", 0, 32)
        checks.whole(self, "sweeps", 0, 32)
        checks.at_least(self, "damp", 0, 10)

    @property
    def unknown_size(self) -> str | None:
        return f"keeps one of the transforms {', '.join(self.transforms)}" if len(self.transforms) > 1 else None

    def branch_bytes(self, rows: Sequence[int], in_features: int) -> int:
        return factor_bytes(self.rank, rows, in_features, self.factor_bits)

    @classmethod
    def paper(cls, **changes: Any) -> LoPRo:
        """The paper's choices: partial rotation of 256-wide blocks after 256 salient columns without signs, R1-sketch
        factors from the scaled weights, no refit, groups of 128."""
        choices: dict[str, Any] = {
            "group_size": 128,
            "rank": 16,
            "transforms": ("partial",),
            "salient": 256,
            "signs": False,
            "low_rank": "r1_sketch",
            "power_iterations": 8,
            "refits": 0,
            "sweeps": 0,
            "clip_steps": 90,
            "token_clip": 0,
            "asymmetry": 0.0,
        }
        return cls(**{**choices, **changes})

    @property
    def joint(self) -> bool:
        return self.rank > 0 or len(self.transforms) > 1

    def transform(self, joint: Tensor, stats: Statistics, generator: torch.Generator) -> Transform:
        residual = joint
        if self.rank:
            up, down = initial_factors(joint, stats, self, generator)
            residual = joint - up @ down
        return transform_for(self.transforms[0], residual, stats.gram, self, generator)

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None,
    ) -> GroupSolution:
        return solve(joint, share, rows, stats, self, generator, transform)


@dataclass(frozen=True)
class _Problem:
    """One candidate transform: W T, Tᵀ H T, its feedback, the damping without `shrinkage` that it needed, the rounding
    order of columns, the scale of rows.

    Rows of the weight are in units of their own; `share` (m, 1) takes them to the unit of the up factors.
    """

    name: str
    transform: Transform
    weight: Tensor
    gram: Tensor
    fb: Feedback
    damp: float
    order: Tensor
    share: Tensor
    rows: Tensor


def solve(
    joint: Tensor,
    share: Tensor,
    rows: list[int],
    stats: Statistics,
    config: LoPRo,
    generator: torch.Generator,
    chosen: Transform | None,
) -> GroupSolution:
    """Quantise the row-wise concatenation `joint` (sum(rows), n) fp32 of a unit's weights, in units of their rows.

    `share` (m, 1) fp32 holds powers of two that take the rows to one unit: that of the up factors, the errors and the
    loss. `chosen` is the transform, where it was chosen for more Linears than these.

    Each candidate transform is tried once. The one of least proxy loss is refined by alternating between the factors
    and the rounding; the best iterate is kept, so the loss never exceeds that of the best candidate alone.
    """
    start = initial_factors(joint, stats, config, generator, share) if config.rank else None
    residual = joint if start is None else joint - start[0] @ start[1]
    best: tuple[GroupSolution, _Problem] | None = None
    losses: dict[str, float] = {}
    for name in config.transforms:
        transform = chosen or transform_for(name, residual * share, stats.gram, config, generator)
        problem = _pose(name, transform, joint, stats, config, share)
        branch = None if start is None else _rounded(start[0], transform.forward(start[1]), problem, rows, config)
        solution = _attempt(problem, branch, rows, config, generator)
        losses[name] = solution.loss
        if best is None or solution.loss < best[0].loss:
            best = solution, problem
    assert best is not None
    solution, problem = best
    for _ in range(config.refits - 1 if config.rank else 0):
        assert solution.down is not None
        again = _attempt(problem, Branch(solution.down, solution.ups), rows, config, generator)
        if again.loss >= solution.loss:
            break
        solution = again
    whole = proxy_loss(joint * stats.row_scale(share), stats.gram)
    return replace(solution, relative=solution.loss / whole if whole > 0 else 0.0, losses=losses)


def initial_factors(
    joint: Tensor, stats: Statistics, config: LoPRo, generator: torch.Generator, share: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute factors (m, r) and (r, n) of the unrounded weights, in original coordinates.

    `share` (m, 1) weighs the rows, see `solve`.

    "block_svd" takes the best rank-r approximation in the Gram norm. "r1_sketch" is the paper: columns are scaled by
    s first, so columns with large activations are fitted more closely (LoPRo equation 4).
    """
    if config.low_rank == "block_svd":
        weighed = joint * stats.row_scale(torch.as_tensor(share, dtype=joint.dtype, device=joint.device))
        down = gram_components(weighed, stats.gram, config.rank, generator, config.power_iterations)
        return fit_up(joint, stats.gram, down), down
    scale = column_scale(stats.magnitude, _SCALE_POWER)
    left, right = r1_sketch(
        joint * share * scale,
        config.rank,
        generator,
        config.power_iterations,
        lambda v: round_factor(v.unsqueeze(0), config.factor_bits, 0).dense()[0],
    )
    return divided(left, torch.as_tensor(share, dtype=left.dtype, device=left.device)), right / scale


def transform_for(name: str, residual: Tensor, gram: Tensor, config: LoPRo, generator: torch.Generator) -> Transform:
    """Make the candidate transform `name` (see `LoPRo.transforms`) for a residual (m, n) and its Gram."""
    n = residual.shape[1]
    if name == "identity":
        return Transform()
    if name == "act_order":
        return Transform(perm=rotation.as_index(rotation.energy_order(gram)))
    signs = rotation.random_signs(n, generator, residual.device)
    if name == "full":
        block = rotation.largest_block(n, config.block_size)
        order = rotation.mixing_order(residual, block, generator)
        return Transform(None if order is None else rotation.as_index(order), signs if block > 1 else None, block)
    skip = min(config.salient, n)
    perm = rotation.as_index(rotation.importance_order(residual, gram))
    block = rotation.largest_block(n - skip, config.block_size)
    return Transform(perm, signs if config.signs and block > 1 else None, block, skip if block > 1 else 0)


def _pose(name: str, transform: Transform, joint: Tensor, stats: Statistics, config: LoPRo, share: Tensor) -> _Problem:
    moved = transform.gram(stats.gram)
    order = config.quantizer.order(moved)
    fb, damp = informed_feedback(moved, order, config.damp, stats)
    return _Problem(name, transform, transform.forward(joint), moved, fb, damp, order, share, stats.row_scale(share))


def _rounded(up: Tensor, down: Tensor, problem: _Problem, rows: list[int], config: LoPRo) -> Branch:
    """Round both factors; the up factor is solved again for the rounded down factor where refits are on."""
    factor = round_factor(down, config.factor_bits, 0)
    if config.refits:
        up = fit_up(problem.weight, problem.gram, factor.dense())
    return round_branch(up, factor, problem.share, rows, config.factor_bits)


def _attempt(
    problem: _Problem, branch: Branch | None, rows: list[int], config: LoPRo, generator: torch.Generator
) -> GroupSolution:
    """Round the weights around `branch`, then solve the branch again for the remaining error."""
    target = problem.weight if branch is None else problem.weight - branch.dense(problem.share)
    rounded = round_with_feedback(
        target, problem.fb, config.quantizer, rows, order=problem.order, importance=problem.rows.square().squeeze(1)
    )
    rounded = config.quantizer.refine(target, damped(problem.gram, problem.fb.damp), rounded, config.sweeps)
    error = problem.weight - rounded.dense()
    if branch is not None and config.refits:
        up, down = correction(error, problem.gram, config.rank, config.factor_bits, generator, problem.rows)
        branch = round_branch(up, down, problem.share, rows, config.factor_bits)
    left = error if branch is None else error - branch.dense(problem.share)
    loss = proxy_loss(left * problem.rows, problem.gram)
    down, ups = (branch.down, branch.ups) if branch else (None, ())
    return GroupSolution(problem.transform, rounded, down, ups, loss, 0.0, problem.damp, problem.name)
