"""LRQ and FlexRound: rounding learned from the output of a block (arXiv 2407.11534; 2306.00317).

Each weight is divided before it is rounded, by a divisor that is learned block by block (see `divisors`): of low rank
in LRQ, one a weight in FlexRound. What is stored are codes and scales as of any method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lopro_fx.errors import ConfigError, first_line
from lopro_fx.layer import Layer, Transform
from lopro_fx.methods import checks
from lopro_fx.methods.base import Block, Context, Solved, setting
from lopro_fx.methods.divisors import LearnedRounding
from lopro_fx.methods.gptq import GPTQ
from lopro_fx.methods.lopro import LoPRo
from lopro_fx.methods.observers import Statistics
from lopro_fx.methods.rounding import Rounding
from lopro_fx.methods.rtn import RTN
from lopro_fx.methods.solution import GroupSolution

_STARTS: dict[str, type[Rounding]] = {"rtn": RTN, "gptq": GPTQ, "lopro": LoPRo}
# Times that the held-out error is measured while a block learns.
_LOOKS = 8


@dataclass(frozen=True, kw_only=True)
class LRQ(Rounding):
    """Rounding with learned divisors (LRQ, arXiv 2407.11534; FlexRound, 2306.00317).

    Args:
        start: method whose codes learning starts from: "rtn" (the papers), "gptq" or "lopro" (behind its rotation).
        divisors: "full", a divisor for each weight (FlexRound), or "low_rank" (LRQ). Full ones measured better.
        divisor_rank: of LRQ's divisors; None takes a quarter of the smaller side of each weight.
        steps: of gradient descent a block, the first third on scales alone; 0 leaves the start as it is.
        step_batches: calibration batches a step.
        learning_rate: of the divisors' logarithms at first; it falls to 0 by a cosine (Adam).
        scale_rate: the same of the scales' logarithms, in each of the two parts.
        held_out: part of the batches that is not learned from. The iterate of least error on them is kept.
    """

    start: str = setting("lopro", "what learning starts from: rtn, gptq or lopro (default: lopro)", tuple(_STARTS))
    divisors: str = setting("full", "low_rank (LRQ) or full (FlexRound) (default: full)", ("low_rank", "full"))
    divisor_rank: int | None = None
    steps: int = setting(150, "steps of learning a block (default: 150)")
    step_batches: int = 1
    learning_rate: float = 1e-2
    scale_rate: float = 1e-3
    held_out: float = 0.05
    name: ClassVar[str] = "lrq"
    learns: ClassVar[bool] = True
    default_asymmetry: ClassVar[float] = 0.4
    of_run: ClassVar[tuple[str, ...]] = (
        *Rounding.of_run, "start", "divisors", "divisor_rank", "steps", "step_batches", "learning_rate", "scale_rate",
        "held_out",
    )  # fmt: skip
    of_language_models: ClassVar[dict[str, Any]] = {**Rounding.of_language_models, "importance": "gradient"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format != "affine":
            raise ConfigError(f"LRQ(format={self.format!r}): it learns codes of format 'affine'; take LoPRo")
        checks.choice(self, "start", tuple(_STARTS))
        checks.choice(self, "divisors", ("low_rank", "full"))
        if self.divisor_rank is not None:
            checks.whole(self, "divisor_rank", 0, 65536)
            if self.divisors == "full":
                raise ConfigError(f"LRQ(divisor_rank={self.divisor_rank!r}): give divisors='low_rank' with it")
        checks.whole(self, "steps", 0, 1_000_000)
        checks.whole(self, "step_batches", 1, 65536)
        checks.at_least(self, "learning_rate", 0, 1)
        checks.at_least(self, "scale_rate", 0, 1)
        checks.at_least(self, "held_out", 0, 0.9)

    @classmethod
    def paper(cls, **changes: Any) -> LRQ:
        """The paper's choices: scales of rows, a start from rounding to nearest, 5000 steps of two batches."""
        choices: dict[str, Any] = {
            "group_size": -1,
            "start": "rtn",
            "divisors": "low_rank",
            "steps": 5000,
            "step_batches": 2,
            "learning_rate": 5e-4,
            "scale_rate": 5e-4,
            "asymmetry": 0.0,
            "token_clip": 0,
        }
        return cls(**{**choices, **changes})

    def transform(self, joint: Tensor, stats: Statistics, generator: torch.Generator) -> Transform:
        return self._start.transform(joint, stats, generator)

    def solve_rows(
        self,
        joint: Tensor,
        share: Tensor,
        rows: list[int],
        stats: Statistics,
        generator: torch.Generator,
        transform: Transform | None,
    ) -> GroupSolution:
        return self._start.solve_rows(joint, share, rows, stats, generator, transform)

    def learn(self, block: Block, context: Context, label: Callable[[str], None]) -> Sequence[Solved]:
        solutions = [solved for _, solved in block.units]
        learned = self._learned(block, context)
        if not learned or not self.steps or not block.batches:
            return solutions
        try:
            errors = _Descent(self, block, learned, context, label).run()
        except _UnlearnableError as reason:
            warnings.warn(f"block '{block.name}' keeps its start: nothing is learned from it, {reason}", stacklevel=2)
            return solutions
        return [
            replace(solved, layers=tuple(_changed(layer, learned, errors) for layer in solved.layers))
            for solved in solutions
        ]

    @property
    def _start(self) -> Rounding:
        shared = {field.name: getattr(self, field.name) for field in fields(Rounding) if field.name != "overrides"}
        return _STARTS[self.start](**shared)

    def _learned(self, block: Block, context: Context) -> dict[str, LearnedRounding]:
        found = {}
        for unit, solved in block.units:
            for weight, layer in zip(unit.weights, solved.layers, strict=True):
                if layer.weight.format == "affine":
                    target = solved.input.transform.forward(weight.to(torch.float32))
                    rank = None if self.divisors == "full" else self._rank(weight)
                    found[layer.name] = LearnedRounding(layer.weight, target, rank, context.generator)
        return found

    def _rank(self, weight: Tensor) -> int:
        least = min(weight.shape[-2:])
        return math.ceil(least / 4) if self.divisor_rank is None else min(self.divisor_rank, least)


def _changed(layer: Layer, learned: dict[str, LearnedRounding], errors: tuple[float, float]) -> Layer:
    if layer.name not in learned:
        return layer
    own = learned[layer.name]
    # The loss in the Gram's norm was that of the start.
    metrics = {key: value for key, value in layer.metrics.items() if key != "relative_loss"}
    metrics |= {"block_error": errors[1], "block_error_before": errors[0], "learned_numbers": own.numbers}
    return replace(layer, weight=own.packed(), metrics=metrics)


class _UnlearnableError(Exception):
    """Reason why a block's output can't be learned from."""


class _Descent:
    """Gradient descent on the divisors and scales of a block."""

    def __init__(
        self,
        config: LRQ,
        block: Block,
        learned: dict[str, LearnedRounding],
        context: Context,
        label: Callable[[str], None],
    ) -> None:
        self._config, self._block, self._label, self._rng = config, block, label, context.generator
        self._learned, self._weights = learned, {name: own.weight for name, own in learned.items()}
        count = round(config.held_out * block.batches)
        if config.held_out and block.batches > 1:
            count = min(max(count, 1), block.batches - 1)
        if block.batches == 1:
            count = 0
        self._seen = list(range(block.batches - count))
        # Without batches to spare, the error is that of the batches learned from.
        self._held = list(range(block.batches - count, block.batches)) or self._seen

    def run(self) -> tuple[float, float]:
        """Leave the best iterate in the parameters; return the held-out error before and after."""
        first = self._least = self._held_error()
        if not math.isfinite(first):
            raise _UnlearnableError("its output is not finite")
        self._best = self._values()
        # Scales can't undo what feedback has found, and on some models divisors only do.
        alone = self._config.steps // 3
        for done, steps, rate in ((0, alone, 0.0), (alone, self._config.steps - alone, self._config.learning_rate)):
            self._descend(done, steps, rate, first)
            for own, values in zip(self._learned.values(), self._best, strict=True):
                own.restore(values)
        return first, self._least

    def _descend(self, done: int, steps: int, rate: float, first: float) -> None:
        """Take `steps` steps after `done` others, with the divisors' learning rate `rate`."""
        config, every = self._config, max(1, self._config.steps // _LOOKS)
        divisors = [parameter for own in self._learned.values() for parameter in own.divisors]
        scales = [parameter for own in self._learned.values() for parameter in own.scales]
        groups = [(divisors, rate)] if rate else []
        groups += [(scales, config.scale_rate)] if config.scale_rate else []
        if not groups:
            return
        optimizer = torch.optim.Adam([{"params": parameters} for parameters, _ in groups])
        queue: list[int] = []
        wanted = min(config.step_batches, len(self._seen))
        for step in range(steps):
            while len(queue) < wanted:
                queue += torch.randperm(len(self._seen), generator=self._rng, dtype=torch.int64, device="cpu").tolist()
            chosen, queue = queue[:wanted], queue[wanted:]
            for group, (_, most) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = most * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.enable_grad():
                error = self._block.error(self._weights, [self._seen[place] for place in chosen])
                if not error.requires_grad:
                    raise _UnlearnableError("no gradient comes through it")
                optimizer.zero_grad()
                try:
                    error.backward()
                except RuntimeError as reason:  # such as a value that is written in place
                    raise _UnlearnableError(first_line(reason)) from reason
            optimizer.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                found = self._held_error()
                if not math.isfinite(found):  # diverged: the best so far is what is left of it
                    return
                if found < self._least:
                    self._least, self._best = found, self._values()
            self._label(
                f"{self._block.name}: step {done + step + 1} of {config.steps}, error {first:.3g} to {self._least:.3g}"
            )

    def _values(self) -> list[list[Tensor]]:
        return [own.values() for own in self._learned.values()]

    def _held_error(self) -> float:
        with torch.no_grad():
            found = [self._block.error(self._weights, [place]).item() for place in self._held]
        return sum(found) / len(found)
