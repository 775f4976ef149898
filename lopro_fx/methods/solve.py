"""One entry for every method: a group's weights and statistics in, its solution out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lopro_fx.calibration.statistics import Statistics
from lopro_fx.config import GPTQ, RTN, LoPRo, Method
from lopro_fx.methods import lopro
from lopro_fx.methods.gptq import feedback, proxy_loss, round_with_feedback
from lopro_fx.methods.rotation import Transform, as_index, energy_order, group_order
from lopro_fx.methods.rtn import round_to_nearest
from lopro_fx.methods.solution import GroupSolution


def solve(weights: Sequence[Tensor], stats: Statistics, config: Method, generator: torch.Generator) -> GroupSolution:
    """Quantise the weights (m_i, n) of Linears that share an input.

    Args:
        weights: floating-point matrices of equal width.
        stats: Gram and magnitude of the shared input.
        config: an `RTN`, `GPTQ` or `LoPRo`.
        generator: source of every random choice.
    """
    rows = [weight.shape[0] for weight in weights]
    joint = torch.cat([weight.to(torch.float32) for weight in weights])
    if isinstance(config, LoPRo):
        return lopro.solve(joint, rows, stats, config, generator)
    if isinstance(config, GPTQ):
        return _solve_gptq(joint, stats.gram, config)
    assert isinstance(config, RTN), config
    rounded = round_to_nearest(joint, config.bits, config.group_size, config.clip_steps)
    loss = proxy_loss(joint - rounded.dense(), stats.gram)
    return GroupSolution(Transform(), rounded, None, (), loss, relative_loss(loss, joint, stats.gram), 0.0, "identity")


def _solve_gptq(joint: Tensor, gram: Tensor, config: GPTQ) -> GroupSolution:
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
    loss = proxy_loss(target - rounded.dense(), moved)
    relative = relative_loss(loss, joint, gram)
    return GroupSolution(transform, rounded, None, (), loss, relative, fb.damp, f"act_order={config.act_order}")


def relative_loss(loss: float, weight: Tensor, gram: Tensor) -> float:
    """Loss over tr(W H Wᵀ), 0 for a weight that does nothing."""
    whole = proxy_loss(weight, gram)
    return loss / whole if whole > 0 else 0.0
