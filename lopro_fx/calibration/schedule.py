"""Walk the graph once: measure each group where it is first read, have it solved, and feed the result forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from lopro_fx.calibration.importance import Importance
from lopro_fx.calibration.padding import Padding
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.calibration.statistics import Statistics, data_free, measure
from lopro_fx.config import Method
from lopro_fx.passes.sites import Group, weight_of

# Given a group, its statistics and its weights, returns the weights that the quantised sites compute with.
Solve = Callable[[Group, Statistics, list[Tensor]], list[Tensor]]


def run_data_free(
    program: ExportedProgram, groups: Sequence[Group], solve: Solve, device: torch.device | str = "cpu"
) -> None:
    """Solve every group on an identity Gram; nothing of the graph runs."""
    for group in groups:
        solve(group, data_free(group.in_features, device), _weights(program, group, device))


@torch.no_grad()
def run_calibrated(
    program: ExportedProgram,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    solve: Solve,
    config: Method,
    importance: Mapping[str, Importance] | None = None,
    device: torch.device | None = None,
) -> None:
    """Solve every group in graph order on the activations of `batches`.

    Args:
        program: what to run; not changed.
        groups: sites to solve, each group reading one tensor.
        batches: flattened user inputs.
        solve: called once a group, with tensors on `device`.
        config: its `token_clip` and `sequential` apply. Sequentially, quantised results replace the weights before the
            graph goes on; otherwise every group is measured on the unquantised model.
        importance: of tokens and rows, by group, see `measure_importance`.
        device: where to run and solve; by default where the program's tensors lie.
    """
    runner = LockstepRunner(program, batches, device)
    padding = [Padding(program, batch) for batch in batches]
    first = {group.sites[0].nodes[0]: group for group in groups}
    for node, inputs in runner.stops(set(first)):
        group = first[node]
        weight = importance[group.name] if importance else None
        tokens = weight.tokens if weight else None
        visible = [pads.visible(value.shape[:-1]) for pads, value in zip(padding, inputs, strict=True)]
        stats = measure(inputs, group.name, group.source.name, config.token_clip, tokens, visible)
        stats = replace(stats, rows=weight.rows if weight else None)
        weights = _weights(program, group, runner.device)
        solved = solve(group, stats, weights)
        if config.sequential:
            for site, weight in zip(group.sites, solved, strict=True):
                for operand in {operand for node in site.nodes if isinstance(operand := node.args[1], Node)}:
                    runner.weights[operand.name] = weight.to(operand.meta["val"].dtype)


def _weights(program: ExportedProgram, group: Group, device: torch.device | str) -> list[Tensor]:
    return [weight_of(program, site).to(device) for site in group.sites]
