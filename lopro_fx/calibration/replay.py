"""Walk the graph once: measure each unit before it first runs, and run its replacement from there on.

Where an observer needs the unquantised model's activations too, a second walk goes beside the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lopro_fx.calibration.blocks import SolvedBlock, target_of
from lopro_fx.calibration.experts import measure_experts, with_rows
from lopro_fx.calibration.importance import Importance
from lopro_fx.calibration.padding import Padding
from lopro_fx.calibration.runner import LockstepRunner
from lopro_fx.calibration.simulate import simulated
from lopro_fx.calibration.statistics import data_free, measure
from lopro_fx.methods.base import Method, Solved, Unit
from lopro_fx.methods.observers import Statistics
from lopro_fx.passes.blocks import Block, find_blocks
from lopro_fx.passes.sites import Group, weight_of


@dataclass(frozen=True)
class Stage:
    """A block of the program: its units, each to be solved before the next is taken, and what it learns from.

    `solved` is for the units and their solutions; the next stages read the outputs of what it holds. `learnable` makes
    a block of them.
    """

    block: Block
    units: Iterator[tuple[Unit, Statistics]]
    solved: list[tuple[Unit, Solved]]
    learnable: Callable[[], SolvedBlock]


class Replay:
    """Units of a program in solving order, with the calibration statistics of each.

    Args:
        program: what to run; not changed.
        groups: Linears to solve, each group reading one tensor.
        batches: flattened user inputs on `device`; None, or no group, runs nothing.
        method: its observers, `token_clip` and `sequential` apply.
        importance: of tokens and output features, by group, see `measure_importance`.
        device: where to run; units have their tensors there.
    """

    def __init__(
        self,
        program: ExportedProgram,
        groups: Sequence[Group],
        batches: Sequence[Sequence[Any]] | None,
        method: Method,
        importance: Mapping[str, Importance] | None,
        device: torch.device,
    ) -> None:
        self._program, self._groups, self._method, self._device = program, groups, method, device
        self._batches, self._importance = batches, importance
        self._by_name = {group.name: group for group in groups}
        self._runner: LockstepRunner | None = None
        self._padding = [Padding(program, batch) for batch in batches or ()]

    def units(self) -> Iterator[tuple[Unit, Statistics]]:
        """Yield each unit before the graph runs it; call `install` with its solution before taking the next."""
        if self._batches is None or not self._groups:
            for group in self._groups:
                unit = self._unit(group)
                free = data_free(group.in_features, self._method.observers_of(unit), self._device)
                yield unit, replace(free, experts=(free,) * group.experts)
            return
        walk = self._runner = self._walk()
        yield from self._measured(self._groups, walk, self._walk() if self._compares else None)

    def stages(self) -> Iterator[Stage]:
        """Yield the program's blocks: solve and `install` the units of each, into `solved`, before taking the next."""
        assert self._batches is not None
        walk, clean = self._walk(), self._walk()
        walk.allow_gradients()
        for block in find_blocks(self._program, self._groups):
            walk.advance(block.start)
            clean.advance(block.start)
            runner = self._runner = walk.fork()
            units = self._measured(block.groups, runner, clean.fork() if self._compares else None)
            solved: list[tuple[Unit, Solved]] = []
            yield Stage(block, units, solved, partial(self._learnable, block, walk, clean, solved))
            # Of the block as it is solved now, inputs of the next.
            self._runner = walk
            for _, found in solved:
                self.install(found)
            walk.advance(block.end)
            clean.advance(block.end)

    def install(self, solved: Solved) -> None:
        """Run the operators of these layers from here on, if the method is `sequential`."""
        if self._runner is None or not self._method.sequential:
            return
        shared = solved.input.map(lambda tensor: tensor.to(self._device))
        for site, layer in zip(self._by_name[solved.input.name].sites, solved.layers, strict=True):
            layer = layer.map(lambda tensor: tensor.to(self._device))
            for dtype in {node.meta["val"].dtype for node in site.nodes}:
                run = simulated(shared, layer, dtype)
                for node in site.nodes:
                    if node.meta["val"].dtype == dtype:
                        self._runner.replaced[node] = run

    @property
    def _compares(self) -> bool:
        """Whether an observer needs the unquantised model beside the quantised one."""
        return self._method.sequential and any(observer.paired for observer in self._method.observers())

    def _walk(self) -> LockstepRunner:
        return LockstepRunner(self._program, self._batches or (), self._device)

    def _measured(
        self, groups: Sequence[Group], walk: LockstepRunner, unquantised: LockstepRunner | None
    ) -> Iterator[tuple[Unit, Statistics]]:
        first = {group.sites[0].nodes[0]: group for group in groups}
        walks = [walk] if unquantised is None else [walk, unquantised]
        for (node, (inputs, *routes)), *beside in zip(
            *(walk.operand_stops(set(first), 4) for walk in walks), strict=True
        ):
            group = first[node]
            unit = self._unit(group)
            weight = self._importance[group.name] if self._importance else None
            if group.experts:
                ids, _, slots = routes
                before = (beside[0][1][0], beside[0][1][1]) if beside else None
                seen = measure_experts(
                    inputs, ids, slots[0], group.experts, group.name, group.source.name,
                    partial(self._method.observers_of, unit),
                    self._method.token_clip, weight.tokens if weight else None,
                    [pads.of_pairs(len(chosen)) for pads, chosen in zip(self._padding, ids, strict=True)], before,
                )  # fmt: skip
                yield unit, with_rows(seen, weight.rows if weight else None)
                continue
            seen = measure(
                inputs, group.name, group.source.name, self._method.observers_of(unit), self._method.token_clip,
                weight.tokens if weight else None, self._visible(inputs), beside[0][1][0] if beside else None,
            )  # fmt: skip
            yield unit, replace(seen, rows=weight.rows if weight else None)

    def _visible(self, values: Sequence[Tensor]) -> list[Tensor | None]:
        return [pads.visible(value.shape[:-1]) for pads, value in zip(self._padding, values, strict=True)]

    def _learnable(
        self, block: Block, walk: LockstepRunner, clean: LockstepRunner, solved: Sequence[tuple[Unit, Solved]]
    ) -> SolvedBlock:
        clean.advance(block.end)
        last = self._importance[block.groups[-1].name] if self._importance else None
        targets = [
            target_of(values, self._visible(values), self._method.token_clip, last)
            for values in map(clean.values, block.outputs)
        ]
        return SolvedBlock(block, walk, solved, targets, len(self._padding))

    def _unit(self, group: Group) -> Unit:
        weights = [weight_of(self._program, site).to(self._device) for site in group.sites]
        return Unit(group.name, tuple(site.name for site in group.sites), weights)
