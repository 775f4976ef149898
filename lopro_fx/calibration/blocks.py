"""A block of the program between two places of the walk: its units, and the error of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lopro_fx.calibration.importance import Importance
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.calibration.simulate import learned
from lopro_fx.methods.base import Solved, Unit
from lopro_fx.passes.blocks import Block


@dataclass(frozen=True)
class Target:
    """What an output node should be: of each batch its values and the weights of tokens, and those of features."""

    values: list[Tensor]
    tokens: list[Tensor]
    features: Tensor | None
    variance: float


class SolvedBlock:
    """`methods.base.Block` over a walk that stands at the block's start.

    Args:
        block: what to run.
        walk: on quantised inputs; it is not moved.
        units: the block's, with their solutions.
        targets: of its outputs, in their order.
        batches: how many the walk has. Those without a token are left out.
    """

    def __init__(
        self,
        block: Block,
        walk: LockstepRunner,
        units: Sequence[tuple[Unit, Solved]],
        targets: Sequence[Target],
        batches: int,
    ) -> None:
        self._block, self._walk, self._targets = block, walk, targets
        self.name, self.units = block.name, units
        self._places = [place for place in range(batches) if any(target.tokens[place].any() for target in targets)]
        self.batches = len(self._places)
        solved = {layer.name: (solved.input, layer) for _, solved in units for layer in solved.layers}
        self._sites = [(site, *solved[site.name]) for group in block.groups for site in group.sites]

    def error(self, weights: Mapping[str, Callable[[], Tensor]], batches: Sequence[int]) -> Tensor:
        places = [self._places[place] for place in batches]
        runner = self._walk.fork(places)
        for site, shared, layer in self._sites:
            weight = weights[site.name]() if site.name in weights else None
            for node in site.nodes:
                runner.replaced[node] = learned(shared, layer, weight, node.meta["val"].dtype)
        runner.advance(self._block.end)
        total = torch.zeros((), dtype=torch.float32, device=runner.device)
        for node, target in zip(self._block.outputs, self._targets, strict=True):
            for value, place in zip(runner.values(node), places, strict=True):
                error = value.to(torch.float32) - target.values[place].to(torch.float32)
                total = total + _weighted(error, target.tokens[place], target.features) / target.variance
        return total / (len(batches) * len(self._targets))


def target_of(
    values: list[Tensor], visible: Sequence[Tensor | None], token_clip: float, importance: Importance | None
) -> Target:
    """What an output (..., features) should be, from its values in the unquantised model.

    Tokens weigh as in the Grams: by `importance`, that of the block's last Linears, where the output has their features
    and tokens, and less if they are far larger than the median. `visible` is as `measure` takes it.
    """
    rows = [value.detach().reshape(-1, value.shape[-1]).to(torch.float32) for value in values]
    text = [_fitting(shown, len(own), own.device) for shown, own in zip(visible, rows, strict=True)]
    features = None
    weights = [shown.to(torch.float32) for shown in text]
    if importance is not None and len(importance.rows) == rows[0].shape[1]:
        counts = [int(shown.sum()) for shown in text]
        if counts == [len(own) for own in importance.tokens]:
            features = importance.rows
            for weight, shown, own in zip(weights, text, importance.tokens, strict=True):
                weight[shown] = own
    norms = [own.square().sum(1) for own in rows]
    if token_clip:
        every = torch.cat([(norm * weight)[norm * weight > 0] for norm, weight in zip(norms, weights, strict=True)])
        limit = token_clip * (every.median() if len(every) else 0)
        tiny = torch.finfo(torch.float32).tiny
        weights = [weight * (limit / (norm * weight).clamp_min(tiny)).clamp_max(1)
                   for norm, weight in zip(norms, weights, strict=True)]  # fmt: skip
    mean = torch.cat(rows).mean(0)
    spread = sum(_weighted(own - mean, weight, features).item() for own, weight in zip(rows, weights, strict=True))
    # A mean over the batches' sums; an output that is constant has no error to weigh.
    return Target(values, weights, features, spread / len(rows) or 1.0)


def _fitting(visible: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    if visible is not None and len(visible) == tokens:
        return visible
    return torch.ones(tokens, dtype=torch.bool, device=device)


def _weighted(error: Tensor, tokens: Tensor, features: Tensor | None) -> Tensor:
    squared = error.reshape(-1, error.shape[-1]).square()
    return (squared.sum(1) if features is None else squared @ features) @ tokens
