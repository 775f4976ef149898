"""LRC: a low-rank branch that corrects the rounding of activations and weights (arXiv 2412.07902).

    min over Q, B, A   ‖W X - Q Y - B A X‖²        Y: X rounded

The packed weight Q reads the rounded activation, the branch B A the unrounded one. By the Grams S = X Xᵀ, R = Y Yᵀ and
C = X Yᵀ each has a closed form but for the rounding of Q:

    Q         rounds (W - B A) C R⁻¹ in the norm of R
    B, A      best of their rank for W - Q Cᵀ S⁻¹ in the norm of S
    at first  for W in the norm of S - C R⁻¹ Cᵀ, what of X does not follow from Y

All is solved behind the rotation, which is fixed before activations are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError
from lopro_fx.kernels.formats.registry import known_format
from lopro_fx.layer import Activation, Transform
from lopro_fx.methods import checks, rotation
from lopro_fx.methods.base import Context, Solved, Unit, number, seed_of, setting
from lopro_fx.methods.experts import sampled, stacked
from lopro_fx.methods.ldlq import damped, damping, relative_loss, round_with_feedback
from lopro_fx.methods.lopro import FACTOR_BITS
from lopro_fx.methods.lowrank import (
    Branch,
    correction,
    factor_bytes,
    fit_up,
    gram_components,
    round_branch,
    round_factor,
)
from lopro_fx.methods.observers import Observer, RoundedInput, Statistics
from lopro_fx.methods.prior import FACTOR_DAMP, informed_feedback
from lopro_fx.methods.rounding import Rounding, pack_solution
from lopro_fx.methods.solution import GroupSolution


@dataclass(frozen=True, kw_only=True)
class LRC(Rounding):
    """Low-rank correction of rounded activations (arXiv 2412.07902).

    Args:
        rank: components of the branch; None takes as many as `factor_share` allows, 0 none.
        factor_share: numbers in the factors of a branch, as a part of the weights beside it.
        factor_bits: 8 (int8, one fp16 scale a component) or 16 (fp16).
        compensation: part, 0 to 1, of the activation's rounding that the packed weights make up for. 1, the paper, is
            least on the calibration text, but shrinks what the rounding hides, and shrunk signals add up from layer to
            layer.
        deflated: whether weights are rounded for the factors that will be solved for them, not for the present ones.
        iterations: times the weights are rounded, with factors solved before and after. The iterate of least loss is
            kept. The paper's T.
        block_size: largest Hadamard block, as in `LoPRo`; 1 leaves activations unrotated.
        power_iterations: of the factors' solver, each two passes over the matrix.
        sweeps, damp: as in `LoPRo`.
    """

    bits: float = setting(4, "of a weight", kind=number)
    act_bits: int = setting(4, "of a rounded activation: 8 or 4")
    rank: int | None = setting(None, "of LRC's branch (default: by the factors' share)", kind=int)
    factor_share: float = setting(
        0.1, "of LRC's branch: numbers in its factors, as a part of the weights (default: 0.1)"
    )
    factor_bits: int = 8
    compensation: float = 0.5
    deflated: bool = True
    iterations: int = 1
    block_size: int = 256
    power_iterations: int = 2
    sweeps: int = 2
    damp: float = 0.01
    name: ClassVar[str] = "lrc"
    default_asymmetry: ClassVar[float] = 0.4
    of_language_models: ClassVar[Mapping[str, Any]] = {**Rounding.of_language_models, "importance": "gradient"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.act_bits:
            raise ConfigError("LRC(act_bits=0) has no activation to correct: give 4 or 8, or take LoPRo(rank=...)")
        if self.rank is not None:
            checks.whole(self, "rank", 0, 4096)
        checks.at_least(self, "factor_share", 0, 8)
        checks.choice(self, "factor_bits", FACTOR_BITS)
        checks.at_least(self, "compensation", 0, 1)
        checks.flag(self, "deflated")
        checks.whole(self, "iterations", 1, 100)
        checks.choice(self, "block_size", tuple(1 << i for i in range(11)))
        checks.whole(self, "power_iterations", 0, 64)
        checks.whole(self, "sweeps", 0, 32)
        checks.at_least(self, "damp", 0, 10)

    @classmethod
    def paper(cls, **changes: Any) -> LRC:
        """The paper's choices: a step a token, a scale a row, fp16 factors, and inputs of the unquantised model."""
        choices: dict[str, Any] = {
            "group_size": -1,
            "act_group": -1,
            "factor_bits": 16,
            "compensation": 1.0,
            "deflated": False,
            "sweeps": 0,
            "token_clip": 0,
            "sequential": False,
        }
        return cls(**{**choices, **changes})

    @property
    def joint(self) -> bool:
        return True

    def rank_for(self, rows: int, in_features: int) -> int:
        """Components of the branch of Linears with so many rows in all."""
        if self.rank is None:
            return round(self.factor_share * rows * in_features / (rows + in_features))
        return min(self.rank, rows, in_features)

    def branch_bytes(self, rows: Sequence[int], in_features: int) -> int:
        return factor_bytes(self.rank_for(sum(rows), in_features), rows, in_features, self.factor_bits)

    def observers_of(self, unit: Unit) -> Sequence[Observer]:
        own = self._own(unit)
        return *self.observers(), RoundedInput(*own._input_side(unit))

    def solve(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        own = self._own(unit)
        transform, activation = own._input_side(unit)
        solution = own.solution(unit.weights, seen, context.generator, transform)
        return _rounding(pack_solution(unit, solution), activation)

    def solve_experts(self, unit: Unit, seen: Statistics, context: Context) -> Solved:
        own = self._own(unit)
        transform, activation = own._input_side(unit)
        solved = [
            pack_solution(each, own.solution(each.weights, stats, context.generator, transform))
            for each, stats in ((unit.expert(index), stats) for index, stats in enumerate(seen.experts))
        ]
        return _rounding(stacked(unit, solved), activation)

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None,
    ) -> GroupSolution:
        return _Problem(self, joint, share, rows, stats, generator, transform or Transform()).solved()

    def _own(self, unit: Unit) -> LRC:
        own = self.for_unit(unit.names)
        assert isinstance(own, LRC)
        return own

    def _input_side(self, unit: Unit) -> tuple[Transform, Activation]:
        """Transform and rounding of a unit's input: the same whenever they are asked for."""
        generator = torch.Generator().manual_seed(seed_of(unit.name, self.seed))
        joint = sampled(unit) if unit.experts else torch.cat([weight.to(torch.float32) for weight in unit.weights])
        transform, n = Transform(), unit.in_features
        block = rotation.largest_block(n, self.block_size)
        if block > 1:
            signs = rotation.random_signs(n, generator, joint.device)
            order = rotation.mixing_order(joint, block, generator)
            transform = Transform(None if order is None else rotation.as_index(order), signs, block)
        kind = known_format(self.format)
        fitting = min(kind.activation_group(self.empty(tuple(weight.shape)), block > 1) for weight in unit.weights)
        return transform, Activation(self.act_bits, self.act_group or fitting)


def _rounding(solved: Solved, activation: Activation) -> Solved:
    return replace(solved, input=replace(solved.input, activation=activation))


class _Problem:
    """The weights of a unit and the three Grams, behind the transform; rows are in units of their own."""

    def __init__(
        self,
        config: LRC,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform,
    ) -> None:
        self.config, self.share, self.rows, self.stats, self.rng = config, share, rows, stats, generator
        self.transform, self.weight = transform, transform.forward(joint)
        self.clean = transform.gram(stats.gram)
        self.rounded, self.cross = stats.rounded
        self.weights = stats.row_scale(share)
        self.rank = config.rank_for(*joint.shape)

    def solved(self) -> GroupSolution:
        """Alternate between the rounding and the factors; keep the best iterate."""
        branch, best = self._first_branch() if self.rank else None, None
        whole = self.weight * self.weights
        for _ in range(self.config.iterations):
            target, gram = self._target(branch)
            rounded, damp = self._round(target, gram)
            dense = rounded.dense()
            if self.rank:
                branch = self._refitted(dense)
            loss = self.loss(dense, branch)
            if best is not None and loss >= best.loss:
                break
            down, ups = (branch.down, branch.ups) if branch else (None, ())
            relative = relative_loss(loss, whole, self.clean)
            best = GroupSolution(self.transform, rounded, down, ups, loss, relative, damp, "full")
        assert best is not None
        return best

    def loss(self, dense: Tensor, branch: Branch | None) -> float:
        """‖(W - B A) X - Q Y‖² of a packed weight Q and a branch, rows weighed."""
        left = self.weight if branch is None else self.weight - branch.dense(self.share)
        left, dense = left * self.weights, dense * self.weights
        loss = ((left @ self.clean - 2 * dense @ self.cross.T) * left).sum() + (dense @ self.rounded * dense).sum()
        return loss.clamp_min(0).item()

    def _first_branch(self) -> Branch:
        schur = self.clean - _regressed(self.cross, self.rounded, self.config.damp) @ self.cross.T
        schur = (schur + schur.T) / 2
        down = gram_components(self.weight * self.weights, schur, self.rank, self.rng, self.config.power_iterations)
        factor = round_factor(down, self.config.factor_bits, 0)
        up = fit_up(self.weight, schur, factor.dense())
        return round_branch(up, factor, self.share, self.rows, self.config.factor_bits)

    def _refitted(self, dense: Tensor) -> Branch:
        """Branch for what the packed weight lacks."""
        bits = self.config.factor_bits
        lack = self.weight - dense @ _regressed(self.cross.T, self.clean, FACTOR_DAMP)
        up, down = correction(lack, self.clean, self.rank, bits, self.rng, self.weights)
        return round_branch(up, down, self.share, self.rows, bits)

    def _target(self, branch: Branch | None) -> tuple[Tensor, Tensor]:
        """What to round, and the Gram to round it in."""
        plain, cross, gram, damp = self.weight, self.cross, self.rounded, self.config.damp
        if branch is None:
            full = plain @ _regressed(cross, gram, damp)
        elif not self.config.deflated:
            plain = plain - branch.dense(self.share)
            full = plain @ _regressed(cross, gram, damp)
        else:
            # With A fixed and B the best for whatever Q will be, X counts without its projection on A X.
            low = branch.down.dense()
            seen, known = low @ self.clean, low @ cross
            normal = seen @ low.T
            normal.diagonal().add_((1e-6 * normal.diagonal().mean()).clamp_min(torch.finfo(normal.dtype).tiny))
            taken, up = torch.linalg.solve(normal, torch.cat([known, seen @ plain.T], 1)).split(
                [known.shape[1], len(plain)], 1
            )
            gram = gram - known.T @ taken
            gram = (gram + gram.T) / 2
            full = plain @ _regressed(cross - seen.T @ taken, gram, damp)
            plain = plain - up.T @ low
        return plain + self.config.compensation * (full - plain), gram

    def _round(self, target: Tensor, gram: Tensor) -> tuple[Any, float]:
        quantizer = self.config.quantizer
        order, importance = quantizer.order(gram), self.weights.square().squeeze(1)
        fb, damp = informed_feedback(gram, order, self.config.damp, self.stats)
        rounded = round_with_feedback(target, fb, quantizer, self.rows, order=order, importance=importance)
        return quantizer.refine(target, damped(gram, fb.damp), rounded, self.config.sweeps), damp


def _regressed(cross: Tensor, gram: Tensor, damp: float) -> Tensor:
    """C R⁻¹ with a ridge on both: what was hardly seen keeps its weight."""
    ridge = damping(gram, damp) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, (cross + ridge).T).T
