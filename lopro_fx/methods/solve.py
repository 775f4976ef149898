"""One entry for every method: a group's weights and statistics in, its solution out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lopro_fx.calibration.statistics import Statistics
from lopro_fx.config import GPTQ, RTN, LoPRo, Method
from lopro_fx.errors import ConfigError
from lopro_fx.methods import lopro
from lopro_fx.methods.gptq import feedback, proxy_loss, round_with_feedback
from lopro_fx.methods.lowrank import in_unit
from lopro_fx.methods.prior import informed
from lopro_fx.methods.rotation import Transform, as_index, energy_order, group_order
from lopro_fx.methods.rtn import round_to_nearest
from lopro_fx.methods.solution import GroupSolution
from lopro_fx.methods.units import divided, row_units


def solve(weights: Sequence[Tensor], stats: Statistics, config: Method, generator: torch.Generator) -> GroupSolution:
    """Quantise the weights (m_i, n) of Linears that share an input.

    Args:
        weights: floating-point matrices of equal width, of any magnitude that fp32 has, which rows may have each of
            its own.
        stats: Gram and magnitude of the shared input.
        config: an `RTN`, `GPTQ` or `LoPRo`.
        generator: source of every random choice.
    """
    rows = [weight.shape[0] for weight in weights]
    joint = torch.cat([weight.to(torch.float32) for weight in weights])
    units = row_units(joint)
    joint, unit = divided(joint, units), units.amax().item() or 1.0
    share, stats = units / unit, informed(stats)
    if isinstance(config, LoPRo):
        solution = lopro.solve(joint, share, rows, stats, config, generator)
    elif isinstance(config, GPTQ):
        solution = _solve_gptq(joint, share, stats.gram, config)
    elif isinstance(config, RTN):
        solution = _solve_rtn(joint, share, stats.gram, config)
    else:
        raise ConfigError(f"config is a {type(config).__name__}; give an RTN, GPTQ or LoPRo")
    return _in_units(solution, units, unit)


def _in_units(solution: GroupSolution, units: Tensor, unit: float) -> GroupSolution:
    """The solution of weights that were divided by `units` (m, 1), whose largest is `unit`."""
    return replace(
        solution,
        rounded=replace(solution.rounded, scales=solution.rounded.scales * units),
        ups=tuple(in_unit(up, unit) for up in solution.ups),
        loss=solution.loss * unit**2,
        losses={name: loss * unit**2 for name, loss in solution.losses.items()},
    )


def _solve_rtn(joint: Tensor, share: Tensor, gram: Tensor, config: RTN) -> GroupSolution:
    rounded = round_to_nearest(joint, config.bits, config.group_size, config.clip_steps)
    loss = proxy_loss((joint - rounded.dense()) * share, gram)
    relative = relative_loss(loss, joint * share, gram)
    return GroupSolution(Transform(), rounded, None, (), loss, relative, 0.0, "identity")


def _solve_gptq(joint: Tensor, share: Tensor, gram: Tensor, config: GPTQ) -> GroupSolution:
    transform, order = Transform(), None
    if config.act_order == "column":
        transform = Transform(perm=as_index(energy_order(gram)))
    elif config.act_order == "static":
        order = energy_order(gram)
    elif config.act_order == "group":
        order = group_order(gram, config.group_size)
    target, moved = transform.forward(joint), transform.gram(gram)
    fb = feedback(moved if order is None else moved[order][:, order], config.damp)
    static = config.act_order == "static"
    rounded = round_with_feedback(
        target, fb, config.bits, config.group_size, order=order, static=static, clip_steps=config.clip_steps
    )
    loss = proxy_loss((target - rounded.dense()) * share, moved)
    relative = relative_loss(loss, joint * share, gram)
    return GroupSolution(transform, rounded, None, (), loss, relative, fb.damp, f"act_order={config.act_order}")


def relative_loss(loss: float, weight: Tensor, gram: Tensor) -> float:
    """Loss over tr(W H Wᵀ), 0 for a weight that does nothing."""
    whole = proxy_loss(weight, gram)
    return loss / whole if whole > 0 else 0.0
